"""The actors of the scale benchmark: they have the interfaces and traffic of the real ones, but sleep.

They load as little as possible, since 64 of them share a machine.
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
"""Candidates per prompt, sampled in one call."""
SECONDS: Final = 1.0
"""Duration of that call, so that 64 samplers can produce 2048 candidates per second."""
LEARN_SECONDS: Final = 0.4
FLOATS: Final = 250_000
"""Floats in the latents of a candidate: 1 MB."""


class SleepingSampler:
    """A worker with the interface and traffic of `rollout.worker.RolloutWorker` that only sleeps."""

    def __init__(self, **arguments: Any) -> None:
        """Make the latents of all candidates."""
        self.latents = np.zeros(FLOATS, dtype=np.float32)

    def load(self, weights: WeightsId, part: int, parts: int, digest: str, flat: NDArray[Any]) -> WeightsId:
        """Receive weights."""
        return weights

    def sample(self, requests: Sequence[SampleRequest]) -> list[Chunk]:
        """Sleep, then return distinct images, and trajectories of the real size."""
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
        """Return black images."""
        return (True,) * len(prompts), np.zeros((len(prompts), 8, 8, 3), dtype=np.uint8)

    def ping(self) -> None:
        """Answer a call."""


class FirstValue:
    """A scorer whose reward is an image's first value."""

    traits: ClassVar[Traits] = Traits(low=0.0, high=255.0)

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Return the first value of each image."""
        values = images[:, 0, 0, 0].astype(np.float64)
        return Judgement(values=values, valid=np.ones(len(images), dtype=np.bool_))

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Accept any prompt."""


class SleepingRank:
    """A worker with the interface and traffic of `learner.worker.LearnerWorker` that only sleeps."""

    def __init__(self, **arguments: Any) -> None:
        """Prepare the checkpoints."""
        self.storage = Storage()

    def join(self, rank: int, world: int, address: str, port: int) -> None:
        """Join as the only rank."""

    def parts(self) -> int:
        """Return the number of parts of the weights."""
        return 1

    def part(self, number: int, averaged: bool = False) -> tuple[str, NDArray[Any]]:
        """Return weights of 1 MB."""
        return "", np.zeros(FLOATS, dtype=np.float32)

    def update(self, work: RankUpdate) -> Update:
        """Sleep, and return the metrics that the loop needs."""
        time.sleep(LEARN_SECONDS)
        metrics = {
            "ratio_max_deviation": 0.0, "skipped_updates": 0.0, "skipped_in_a_row": 0.0, "updates": 1.0,
        }  # fmt: skip
        return Update(metrics=metrics, suspects=())

    def ping(self) -> int:
        """Return the number of optimizer steps."""
        return 0

    def save(self, url: str) -> None:
        """Save an empty file."""
        self.storage.save(url, lambda folder: (folder / "rank").touch())

    def saved(self, wait: bool) -> Written | None:
        """Return the saved files."""
        return self.storage.saved(wait)
