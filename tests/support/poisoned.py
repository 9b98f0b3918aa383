"""A sampler some of whose candidates are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rollout.records import Noise
from rollout.sampler import Rollout
from rollout.worker import RolloutWorker


def is_poisoned(initial: int) -> bool:
    """Whether a candidate of this initial noise is not finite: about one in four."""
    return initial % 4 == 0


class PoisonedSampler(RolloutWorker):
    """The real one, but the clean latents of some noises have a value that is no number."""

    def _denoise(
        self, encoded: Any, owners: Any, noises: Sequence[Noise], *rest: Any, **part: Any
    ) -> Rollout:
        made = super()._denoise(encoded, owners, noises, *rest, **part)
        clean = made.clean.clone()
        for row, noise in zip(clean, noises, strict=True):
            if is_poisoned(noise.initial):
                row.flatten()[torch.randint(row.numel(), ())] = math.nan
        return replace(made, clean=clean)
