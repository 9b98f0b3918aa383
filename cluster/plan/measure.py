"""Measure the time and the peak memory of a role's work, in a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from multiprocessing import get_context
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cluster.config.settings import RunSettings
from cluster.loop.drawing import oversampled
from cluster.process import private_peak, quieten
from learner.rank_shares import rank_updates
from rewards.settings import RewardSettings
from rollout.batches import Batch, batches
from rollout.records import Chunk, Prompt, group_of
from selection.records import Kept

REPEATS: Final = 4
"""Measurements of each kind, the first of which is a warm-up."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The median seconds of a role's work, the private bytes of its process, and the output of the work."""

    seconds: float
    memory: float
    output: Any


def alone(work: Callable[..., Measured], *arguments: Any) -> Measured:
    """Run one of the functions below in a fresh process."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=quieten) as pool:
        return pool.submit(work, *arguments).result()


def step_batches(settings: RunSettings, prompt: Prompt) -> list[Batch]:
    """Make the batches of a step's finished candidates, if all groups have this prompt."""
    count, seed = settings.selection.candidates, settings.seed
    requests = [oversampled(prompt, group, count, seed=seed) for group in range(settings.groups_per_step)]
    return batches(requests, settings.rollout)


def sampler(settings: RunSettings, prompt: Prompt) -> Measured:
    """Sample a batch, with its chunks as output."""
    from cluster.local.in_process import load_sampler

    worker, batch = load_sampler(settings), step_batches(settings, prompt)[0]
    return _measure(lambda: worker.sample(batch))


def reward(settings: RewardSettings, images: NDArray[np.uint8], prompt: Prompt) -> Measured:
    """Score a batch."""
    from rewards.worker import RewardWorker

    worker = RewardWorker(settings.target, settings.options)
    return _measure(lambda: worker.score(images, [prompt] * len(images)))


def learner(settings: RunSettings, prompt: Prompt, chunks: Sequence[Chunk]) -> Measured:
    """Apply a rank's share of a step's updates to copies of sampled trajectories, and publish weights."""
    from cluster.local.in_process import load_learner

    worker = load_learner(settings)
    count = -(-settings.groups_per_step * settings.selection.keep // settings.learner.ranks)
    request = oversampled(prompt, 0, count, seed=settings.seed)
    sampled = [trajectory for chunk in chunks for trajectory in chunk.trajectories]
    like = replace(chunks[0], trajectories=tuple(islice(cycle(sampled), count)))
    group, keep = group_of(request, [like]), settings.selection.keep
    kept = [Kept(group_id=i // keep, candidate=i, advantage=(-1.0) ** i) for i in range(count)]
    groups = [replace(group, group_id=number) for number in range(-(-count // keep))]
    updates, units = settings.learner.updates, worker.objective.units(kept)
    (work,) = rank_updates(kept, groups, ranks=1, updates=updates, seed=0, step=0, units=units)

    def update() -> None:
        worker.update(work)
        for _ in worker.publish():
            pass

    return _measure(update)


def _measure(work: Callable[[], Any]) -> Measured:
    seconds = []
    output = None
    for _ in range(REPEATS):
        began = time.perf_counter()
        output = work()
        seconds.append(time.perf_counter() - began)
    return Measured(statistics.median(seconds[1:]), private_peak(), output)
