"""A role of a run in a process of its own: how long its work takes and what the process holds at its peak."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cluster.config.settings import RunSettings
from cluster.process_memory import private_peak
from rewards.settings import RewardSettings
from rollout.batches import Batch, batches
from rollout.noise import candidate_noises
from rollout.records import Conditioning, Prompt, SampleRequest, Trajectory

REPEATS: Final = 4
"""Measurements of each kind; the first one warms up."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Median seconds of a role's work, the bytes that its process held for itself, and what the work made."""

    seconds: float
    held: float
    made: Any


def alone(work: Callable[..., Measured], *arguments: Any) -> Measured:
    """Run one of the functions below in a fresh process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def step_batches(settings: RunSettings, prompt: Prompt) -> list[Batch]:
    """The batches of a step whose groups all have this prompt."""
    count = settings.selection.candidates
    requests = [
        SampleRequest(
            group_id=group, prompt=prompt, version=0,
            noises=candidate_noises(settings.seed, prompt.index, group, count),
        )
        for group in range(settings.groups_per_step)
    ]  # fmt: skip
    return batches(requests, settings.rollout)


def sampler(settings: RunSettings, prompt: Prompt) -> Measured:
    """A batch sampled; makes its images, a conditioning and its trajectories."""
    from rollout.worker import RolloutWorker

    worker = RolloutWorker(
        settings.model, settings.rollout, settings.seed, keep_means=settings.learner.needs_means
    )
    worker.version = 0
    batch = step_batches(settings, prompt)[0]
    parts = len(batch)

    def work() -> tuple[Any, ...]:
        _, *made = worker.sample(batch)
        return np.concatenate(made[:parts]), *made[parts : parts + 1], *made[2 * parts :]

    return _measure(work)


def reward(settings: RewardSettings, images: NDArray[np.uint8], prompt: Prompt) -> Measured:
    """A batch scored."""
    from rewards.worker import RewardWorker

    worker = RewardWorker(settings.target, settings.options)
    return _measure(lambda: worker.score(images, [prompt] * len(images)))


def learner(settings: RunSettings, conditioning: Conditioning, sampled: Sequence[Trajectory]) -> Measured:
    """A rank's part of the updates of a step, on trajectories like the sampled, and its weights published."""
    from learner.rank_shares import shares
    from learner.worker import LearnerWorker
    from selection.records import Kept

    worker = LearnerWorker(
        settings.model, settings.rollout, settings.learner, settings.seed, settings.optimizer_steps
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    worker.join(0, 1, "127.0.0.1", port)
    count = -(-settings.groups_per_step * settings.selection.keep // settings.learner.ranks)
    kept = [Kept(group_id=0, candidate=i, advantage=(-1.0) ** i) for i in range(count)]
    (share,) = shares(kept, ranks=1, updates=settings.learner.updates, seed=0, step=0)
    arrays = [sampled[i % len(sampled)] for i in range(count)]

    def work() -> None:
        worker.update(share, [0], conditioning, *arrays)
        for _ in worker.publish():
            pass

    return _measure(work)


def _measure(work: Callable[[], Any]) -> Measured:
    seconds = []
    made = None
    for _ in range(REPEATS):
        began = time.perf_counter()
        made = work()
        seconds.append(time.perf_counter() - began)
    return Measured(statistics.median(seconds[1:]), private_peak(), made)
