"""A sampler at the end of a bad line."""

from __future__ import annotations

from typing import Any

from rollout.records import WeightsId
from rollout.worker import RolloutWorker


class DamagedSampler(RolloutWorker):
    """The real one, but of what it is sent, the first so many parts have a bit flipped."""

    def __init__(self, damages: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.damages = damages

    def load(self, weights: WeightsId, part: int, parts: int, digest: str, flat: Any) -> WeightsId | None:
        if self.damages:
            self.damages -= 1
            flat = flat.copy()
            flat.view("uint8")[len(flat)] ^= 4
        return super().load(weights, part, parts, digest, flat)
