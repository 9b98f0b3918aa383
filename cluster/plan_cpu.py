"""What a run on this machine's CPUs takes: a few steps of its workers are measured in this process."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import psutil
import torch

from cluster.plan_records import Estimate, Need
from cluster.preflight import Inputs, check, memory_gb, processes
from cluster.settings import RunSettings
from cluster.solo import Scorers, load_scorers, score
from learner.batch import shares
from learner.worker import LearnerWorker
from rollout.noise import candidate_noises
from rollout.records import SampleRequest
from rollout.worker import RolloutWorker
from selection.records import Kept

REPEATS: Final = 4
"""Measurements of each kind; the first one warms up."""
SERVICE: Final = 0.05
"""Seconds that Ray, the selector and the record of a step take, as measured on the bundled presets."""


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds: a chunk sampled and scored, a rank's part of the updates of a step, weights handed over."""

    sample: float
    score: float
    learn: float
    broadcast: float


def estimate(settings: RunSettings) -> Estimate:
    """Memory of all processes and seconds per step.

    Raises:
        UserError: if the configuration cannot be run.
    """
    inputs = check(settings)
    times, cores = _measure(settings, inputs), psutil.cpu_count() or 1
    rollout, learner = settings.rollout, settings.learner
    chunks = settings.groups_per_step * -(-settings.selection.candidates // rollout.batch)
    # Samplers and shards work at the same time: as long as the slowest of them, or as the cores need for all.
    sampling = -(-chunks // rollout.workers) * times.sample
    work = chunks * (times.sample * rollout.threads + times.score) / cores
    stages = {
        "sample and score": max(sampling + times.score, work),
        "learn": times.learn * max(1.0, learner.ranks * learner.threads / cores),
        "broadcast and record": times.broadcast + SERVICE,
    }
    held = sum(processes(settings).values())
    need = Need("all processes", held, 0, {"memory": memory_gb(settings) * 1e9}, _free())
    basis = f"{REPEATS - 1} measured steps on {cores} cores"
    return Estimate(stages, (need,), settings.max_staleness > 0, basis)


def _free() -> float:
    return float(psutil.virtual_memory().available)


def _measure(settings: RunSettings, inputs: Inputs) -> _Times:
    sampler = RolloutWorker(
        settings.model, settings.rollout, settings.seed, keep_means=settings.learner.needs_means
    )
    learner = LearnerWorker(
        settings.model, settings.rollout, settings.learner, settings.seed, settings.optimizer_steps
    )
    learner.join(0, 1, "127.0.0.1", _port())
    scorers = load_scorers(settings)
    rounds = [_round(settings, inputs, sampler, learner, scorers) for _ in range(REPEATS)]
    return _Times(*(statistics.median(column) for column in zip(*rounds[1:], strict=True)))


def _round(
    settings: RunSettings, inputs: Inputs, sampler: RolloutWorker, learner: LearnerWorker, scorers: Scorers
) -> tuple[float, float, float, float]:
    """One chunk sampled and scored, an update of a rank's usual size made of it, and its weights' way."""
    torch.set_num_threads(settings.rollout.threads)
    handing, _ = _timed(lambda: _hand_over(learner, sampler))
    prompt = inputs.train[0]
    count = min(settings.rollout.batch, settings.selection.candidates)
    noises = candidate_noises(settings.seed, prompt.index, 0, count)
    request = SampleRequest(group_id=0, prompt=prompt, noises=noises, version=0)
    sampling, found = _timed(lambda: sampler.sample(request))
    _, images, conditioning, *trajectories = found
    prompts = [prompt] * count
    scoring, _ = _timed(lambda: score(scorers, settings.rewards, images, prompts, settings.combine))
    torch.set_num_threads(settings.learner.threads)
    mine = -(-settings.groups_per_step * settings.selection.keep // settings.learner.ranks)
    kept = [Kept(group_id=0, candidate=i, advantage=(-1.0) ** i) for i in range(mine)]
    (share,) = shares(kept, ranks=1, updates=settings.learner.updates, seed=0, step=0)
    arrays = [trajectories[i % count] for i in range(mine)]
    learning, _ = _timed(lambda: learner.update(share, [0], conditioning, *arrays))
    return sampling, scoring, learning, handing


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def _hand_over(learner: LearnerWorker, sampler: RolloutWorker) -> None:
    for number, (digest, flat) in enumerate(learner.publish()):
        assert flat is not None  # the only rank
        sampler.load(0, number, learner.parts(), digest, flat)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
