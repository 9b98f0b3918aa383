"""How far one driver goes: the real loop over simulated samplers that sleep and return 1 MB per candidate."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import psutil
import ray
from numpy.typing import NDArray

from cluster.bench_measure import Report, Row
from cluster.bench_models import no_more
from cluster.checkpoints import Checkpoints
from cluster.evaluation import held_out
from cluster.guard import Guard
from cluster.learners import Learner
from cluster.loop import Run, train
from cluster.placement import connect
from cluster.run_folder import RunFolder
from cluster.scoring import Rewards
from cluster.settings import ClusterSettings, RunSettings, resolve
from cluster.stages import Rollouts, Selector, Stages
from learner.records import Update
from rewards.scorer import Judgement, Traits
from rollout.prompts import load_prompts
from rollout.records import Conditioning, Noise, Prompt, SampleRequest, Trajectory

SAMPLERS: Final = (1, 4, 16, 64)
CANDIDATES: Final = 32
"""Per prompt; a sampler makes them in one call."""
SECONDS: Final = 1.0
"""What a sampler takes for them, so that 64 samplers offer 2048 candidates per second."""
LEARN_SECONDS: Final = 0.4
STEPS: Final = 8
"""Steps per measurement."""
WARMUP: Final = 4
FLOATS: Final = 250_000
"""1 MB of latents per candidate."""
STORE_GB: Final = 6.0


class SleepingSampler:
    """Has the interface of `rollout.worker.RolloutWorker`, and its traffic, but sleeps."""

    def __init__(self, **arguments: Any) -> None:
        """Make the latents that every candidate gets."""
        self.latents = np.zeros(FLOATS, dtype=np.float32)

    def load(self, version: int, part: int, parts: int, digest: str, flat: NDArray[Any]) -> int:
        """Take weights."""
        return version

    def sample(self, request: SampleRequest) -> tuple[Any, ...]:
        """Sleep; then images that differ, and trajectories of their size."""
        time.sleep(SECONDS)
        images = np.zeros((len(request.noises), 8, 8, 3), dtype=np.uint8)
        images[:, 0, 0, 0] = [noise.path % 251 for noise in request.noises]
        nothing = np.zeros(1, dtype=np.float32)
        trajectory = Trajectory(latents=self.latents, log_probs=nothing, steps=np.zeros(1, dtype=np.int64))
        return SECONDS, images, Conditioning(arrays={}), *[trajectory] * len(images)

    def evaluate(self, prompts: Sequence[Prompt], noises: Sequence[Noise]) -> tuple[float, NDArray[np.uint8]]:
        """Black images."""
        return 0.0, np.zeros((len(prompts), 8, 8, 3), dtype=np.uint8)

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

    def join(self, rank: int, world: int, address: str, port: int) -> None:
        """There is one rank."""

    def parts(self) -> int:
        """Weights in one part."""
        return 1

    def part(self, number: int, averaged: bool = False) -> tuple[str, NDArray[Any]]:
        """Weights of 1 MB."""
        return "", np.zeros(FLOATS, dtype=np.float32)

    def update(self, shares: Any, groups: Any, *arrays: Any) -> Update:
        """Sleep."""
        time.sleep(LEARN_SECONDS)
        metrics = {"ratio_max_deviation": 0.0, "skipped_updates": 0.0, "skipped_in_a_row": 0.0}
        return Update(metrics=metrics, suspects=())

    def save(self, url: str) -> None:
        """Nothing to save."""

    def saved(self, wait: bool) -> bool:
        """Nothing is under way."""
        return True


class _Rollouts(Rollouts):
    target = f"{__name__}:SleepingSampler"


class _Learner(Learner):
    target = f"{__name__}:SleepingRank"


@dataclass(frozen=True, slots=True)
class Mark:
    """The driver at the end of a step: wall clock, its processor time, its memory in MB."""

    wall: float
    cpu: float
    memory: float


def options(parser: argparse.ArgumentParser) -> None:
    """What can be said about it."""
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--samplers", type=int, nargs="+", default=SAMPLERS, help="how many, one measurement each"
    )


def measure(options: argparse.Namespace, rest: Sequence[str]) -> Report:
    """Candidates per second by the number of samplers; wants nothing else on the machine."""
    no_more(rest)
    rows: list[Row] = []
    connect(ClusterSettings(object_store_gb=STORE_GB))
    try:
        for count in options.samplers:
            rows += _rows(count, asyncio.run(_go(count, options.repeats)))
    finally:
        ray.shutdown()
    each = 1e3 * SECONDS / CANDIDATES
    return Report(f"{STEPS} steps at staleness 1; 1 MB and {each:.0f} ms per candidate", rows)


def _settings(samplers: int, steps: int) -> RunSettings:
    return resolve("shapes", {
        "steps": steps, "groups_per_step": samplers, "max_staleness": 1, "eval_every": steps,
        "image_every": steps, "checkpoint_every": steps, "guard": {"action": "off"},
        "rollout": {"workers": samplers, "batch": CANDIDATES},
        "selection": {"candidates": CANDIDATES, "keep": 8},
        "rewards": [{"name": f"{__name__}:FirstValue", "batch": CANDIDATES}],
    })  # fmt: skip


async def _go(samplers: int, repeats: int) -> list[Mark]:
    """Marks at the beginning and after every measurement of a run."""
    settings = _settings(samplers, WARMUP + STEPS * repeats + 1)  # the last step also evaluates
    stages = Stages(_Rollouts(settings), Rewards(settings), Selector(settings), _Learner(settings), None)
    await stages.ready()
    marks: list[Mark] = []
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        prompts, drawn = (
            load_prompts(settings.prompts.train),
            held_out(load_prompts(settings.prompts.eval)[:1], settings),
        )

        def mark(metrics: dict[str, Any]) -> None:
            memory = psutil.Process().memory_info().rss / 1e6
            marks.append(Mark(time.perf_counter(), time.process_time(), memory))

        checkpoints = Checkpoints(str(folder.checkpoints), 1)
        await train(
            Run(settings, folder, prompts, drawn, stages, checkpoints, [mark], Guard(settings.guard, [])), 0
        )
    for actor in [*stages.learner.actors, *(slot.actor for pool in stages.pools for slot in pool.slots)]:
        ray.kill(actor)
    return marks[WARMUP:-1:STEPS]


def _rows(samplers: int, marks: Sequence[Mark]) -> list[Row]:
    made = samplers * CANDIDATES * STEPS
    pairs = list(pairwise(marks))
    rates = [made / (b.wall - a.wall) for a, b in pairs]
    return [
        Row(f"{samplers} samplers: candidates per second", rates, 0),
        Row("  busy, %", [100 * rate * SECONDS / (samplers * CANDIDATES) for rate in rates], 1),
        Row("  driver, ms per candidate", [1e3 * (b.cpu - a.cpu) / made for a, b in pairs]),
        Row("  driver's memory, MB", [mark.memory for mark in marks], 0),
    ]
