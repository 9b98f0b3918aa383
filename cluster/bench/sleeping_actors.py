"""The actors of the scale benchmark: interfaces and traffic of the real ones, but they sleep.

They load as little as can be, since 64 of them share a machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from learner.checkpoint_upload import Storage
from learner.rank_shares import RankUpdate
from learner.records import Update, Written
from rewards.scorer import Judgement, Traits
from rollout.records import Chunk, Conditioning, Noise, Prompt, SampleRequest, Trajectory, WeightsId

CANDIDATES: Final = 32
"""Per prompt; a sampler makes them in one call."""
SECONDS: Final = 1.0
"""What a sampler takes for them, so that 64 samplers offer 2048 candidates per second."""
LEARN_SECONDS: Final = 0.4
FLOATS: Final = 250_000
"""1 MB of latents per candidate."""


class SleepingSampler:
    """Has the interface of `rollout.worker.RolloutWorker`, and its traffic, but sleeps."""

    def __init__(self, **arguments: Any) -> None:
        """Make the latents that every candidate gets."""
        self.latents = np.zeros(FLOATS, dtype=np.float32)

    def load(self, weights: WeightsId, part: int, parts: int, digest: str, flat: NDArray[Any]) -> WeightsId:
        """Take weights."""
        return weights

    def sample(self, requests: Sequence[SampleRequest]) -> list[Chunk]:
        """Sleep; then images that differ, and trajectories of their size."""
        time.sleep(SECONDS)
        (request,) = requests  # of a whole batch
        images = np.zeros((len(request.noises), 8, 8, 3), dtype=np.uint8)
        images[:, 0, 0, 0] = [noise.path % 251 for noise in request.noises]
        nothing = np.zeros(1, dtype=np.float32)
        trajectory = Trajectory(states=self.latents, log_probs=nothing, steps=np.zeros(1, dtype=np.int64))
        return [
            Chunk(
                images=images,
                finite=(True,) * len(images),
                conditioning=Conditioning(arrays={}),
                trajectories=(trajectory,) * len(images),
                seconds=SECONDS,
            )
        ]

    def evaluate(
        self, prompts: Sequence[Prompt], noises: Sequence[Noise]
    ) -> tuple[tuple[bool, ...], NDArray[np.uint8]]:
        """Black images."""
        return (True,) * len(prompts), np.zeros((len(prompts), 8, 8, 3), dtype=np.uint8)

    def ping(self) -> None:
        """Answer."""


class FirstValue:
    """Scores an image by its first value."""

    traits: ClassVar[Traits] = Traits(low=0.0, high=255.0)

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """The first value of each."""
        values = images[:, 0, 0, 0].astype(np.float64)
        return Judgement(values=values, valid=np.ones(len(images), dtype=np.bool_))

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Any prompt will do."""


class SleepingRank:
    """Has the interface of `learner.worker.LearnerWorker`; an update takes its trajectories and sleeps."""

    def __init__(self, **arguments: Any) -> None:
        """Nothing to load."""
        self.storage = Storage()

    def join(self, rank: int, world: int, address: str, port: int) -> None:
        """There is one rank."""

    def parts(self) -> int:
        """Weights in one part."""
        return 1

    def part(self, number: int, averaged: bool = False) -> tuple[str, NDArray[Any]]:
        """Weights of 1 MB."""
        return "", np.zeros(FLOATS, dtype=np.float32)

    def update(self, work: RankUpdate) -> Update:
        """Sleep."""
        time.sleep(LEARN_SECONDS)
        metrics = {
            "ratio_max_deviation": 0.0, "skipped_updates": 0.0, "skipped_in_a_row": 0.0, "updates": 1.0,
        }  # fmt: skip
        return Update(metrics=metrics, suspects=())

    def ping(self) -> int:
        """Nothing was applied yet."""
        return 0

    def save(self, url: str) -> None:
        """Save that it was here."""
        self.storage.save(url, lambda folder: (folder / "rank").touch())

    def saved(self, wait: bool) -> Written | None:
        """What was saved."""
        return self.storage.saved(wait)
