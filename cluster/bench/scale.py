"""Benchmark one driver: the real loop with simulated samplers, which sleep and return 1 MB per candidate."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import psutil
import ray

from cluster.actors.connection import connect
from cluster.actors.learner import Learner, learner_spec
from cluster.actors.rewards import Rewards
from cluster.actors.samplers import Samplers, sampler_spec
from cluster.actors.selector import Selector
from cluster.actors.stages import RayStages
from cluster.bench.sleeping_actors import CANDIDATES, SECONDS
from cluster.bench.table import BenchmarkReport, Measurement, refuse_arguments
from cluster.config.preflight import Inputs
from cluster.config.settings import ClusterSettings, RunSettings
from cluster.config.sources import resolve
from cluster.loop.course import course_of
from cluster.loop.loop import train
from cluster.record.checkpoints import Checkpoints
from cluster.record.run_folder import RunFolder
from rollout.prompts import load_prompts

ACTORS: Final = "cluster.bench.sleeping_actors"
SAMPLERS: Final = (1, 4, 16, 64)
STEPS: Final = 8
"""Steps per measurement."""
WARMUP: Final = 4
STORE_GB: Final = 6.0


@dataclass(frozen=True, slots=True)
class Mark:
    """The driver at the end of a step: wall-clock time, processor time, and memory in MB."""

    wall: float
    cpu: float
    memory: float


def options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--samplers", type=int, nargs="+", default=SAMPLERS, help="numbers of samplers, each measured"
    )


def measure(options: argparse.Namespace, rest: Sequence[str]) -> BenchmarkReport:
    """Measure candidates per second by the number of samplers, on an otherwise idle machine."""
    refuse_arguments(rest)
    rows: list[Measurement] = []
    connect(ClusterSettings(object_store_gb=STORE_GB))
    try:
        for count in options.samplers:
            rows += _rows(count, asyncio.run(_go(count, options.repeats)))
    finally:
        ray.shutdown()
    each = 1e3 * SECONDS / CANDIDATES
    return BenchmarkReport(f"{STEPS} steps at staleness 1; 1 MB and {each:.0f} ms per candidate", rows)


def _settings(samplers: int, steps: int) -> RunSettings:
    return resolve("shapes", {
        "steps": steps, "groups_per_step": samplers, "max_staleness": 1, "eval_every": steps,
        "image_every": steps, "checkpoint_every": steps, "guard": {"action": "off"},
        "rollout": {"workers": samplers, "batch": CANDIDATES},
        "selection": {"candidates": CANDIDATES, "keep": 8},
        "rewards": [{"name": f"{ACTORS}:FirstValue", "batch": CANDIDATES}],
    })  # fmt: skip


async def _go(count: int, repeats: int) -> list[Mark]:
    """Run the loop, and return marks before and after every measurement."""
    settings = _settings(count, WARMUP + STEPS * repeats + 1)  # the last step also evaluates
    samplers = Samplers(settings, replace(sampler_spec(settings), target=f"{ACTORS}:SleepingSampler"))
    learner = Learner(settings, replace(learner_spec(settings), target=f"{ACTORS}:SleepingRank"))
    stages = RayStages(samplers, Rewards(settings), Selector(settings), learner, None)
    await stages.ready()
    marks: list[Mark] = []
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        prompts, (first, *_) = map(load_prompts, (settings.prompts.train, settings.prompts.eval))

        def mark(metrics: dict[str, Any]) -> None:
            memory = psutil.Process().memory_info().rss / 1e6
            marks.append(Mark(time.perf_counter(), time.process_time(), memory))

        checkpoints = Checkpoints(str(folder.checkpoints), 1)
        course = course_of(settings, Inputs(prompts, (first,)), folder, checkpoints, stages, [mark])
        await train(course.run, 0)
    for actor in [
        *stages.learner.actors,
        *(slot.actor for pool in stages.pools.values() for slot in pool.slots),
    ]:
        ray.kill(actor)
    return marks[WARMUP:-1:STEPS]


def _rows(samplers: int, marks: Sequence[Mark]) -> list[Measurement]:
    sampled = samplers * CANDIDATES * STEPS
    pairs = list(pairwise(marks))
    rates = [sampled / (b.wall - a.wall) for a, b in pairs]
    return [
        Measurement(f"{samplers} samplers: candidates per second", rates, 0),
        Measurement("  busy, %", [100 * rate * SECONDS / (samplers * CANDIDATES) for rate in rates], 1),
        Measurement("  driver, ms per candidate", [1e3 * (b.cpu - a.cpu) / sampled for a, b in pairs]),
        Measurement("  driver's memory, MB", [mark.memory for mark in marks], 0),
    ]
