"""Compare a step of the service with the same step of the same loop in one process, without Ray.

Both train from the same seeds and alternate step by step, so their rewards must be equal. Every key of the
configuration can be overridden.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from numpy.typing import NDArray

from cluster.actors.connection import connect
from cluster.actors.stages import start_stages
from cluster.bench.table import BenchmarkReport, Measurement
from cluster.config.preflight import Inputs, check
from cluster.config.settings import RunSettings
from cluster.config.sources import parse_overrides, resolve
from cluster.local.in_process import LocalStages, load_scorers
from cluster.loop.loop import train
from cluster.loop.observers import Ledger
from cluster.loop.production import consecutive
from cluster.loop.run import Observer, Run, Step
from cluster.loop.stages import Stages
from cluster.record.run_folder import RunFolder

PROG = "python -m cluster.bench overhead"


class Turns:
    """An observer that pauses a run until its turn, and measures its steps."""

    def __init__(self, turn: asyncio.Lock, processor: Callable[[], float]) -> None:
        """Alternate with the runs that share the lock, which is fair; ``processor`` counts seconds used."""
        self.turn, self.processor = turn, processor
        self.seconds: list[float] = []
        self.busy: list[float] = []
        self.rewards: list[NDArray[np.float64]] = []
        self._began = self._used = 0.0

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Measure the step, then end this turn and wait for the next."""
        if made is not None:
            self.seconds.append(time.perf_counter() - self._began)
            self.busy.append(self.processor() - self._used)
            self.rewards.append(np.stack([produced.scores.total for produced in made.batch]))
            self.turn.release()
        if step < run.settings.steps:
            await self.turn.acquire()
            self._began, self._used = time.perf_counter(), self.processor()


def with_children() -> float:
    """Count the processor seconds that this process and all it has started, Ray's included, have used."""
    this = psutil.Process()
    found = 0.0
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            found += used.user + used.system
    return found


async def overhead(settings: RunSettings, inputs: Inputs, folder: Path) -> tuple[Turns, Turns]:
    """Train with the service and in this process, in turns."""
    service = start_stages(settings)
    await service.ready()
    local = LocalStages(settings, load_scorers(settings))
    turn = asyncio.Lock()
    turns = Turns(turn, with_children), Turns(turn, time.process_time)

    def go(stages: Stages, *observers: Observer) -> Any:
        return train(Run(settings, inputs.train, stages, consecutive(settings), observers), 0)

    await asyncio.gather(go(service, Ledger(RunFolder(folder)), turns[0]), go(local, turns[1]))
    return turns


def options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("preset", nargs="?", default="shapes")
    parser.add_argument("--repeats", type=int, default=20, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")


def measure(options: argparse.Namespace, rest: Sequence[str]) -> BenchmarkReport:
    """Train both ways.

    Raises:
        UserError: if the configuration is wrong.
    """
    steps = {"steps": options.warmup + options.repeats, "max_staleness": 0}
    settings = resolve(options.preset, {**parse_overrides(list(rest), PROG), **steps})
    inputs = check(settings)
    connect(settings.cluster)
    try:
        with tempfile.TemporaryDirectory() as folder:
            service, local = asyncio.run(overhead(settings, inputs, Path(folder)))
    finally:
        ray.shutdown()
    timed = list(zip(service.seconds, local.seconds, strict=True))[options.warmup :]
    differences = [float(np.abs(a - b).max()) for a, b in zip(service.rewards, local.rewards, strict=True)]
    return BenchmarkReport(
        f"{len(timed)} steps of {options.preset}, {options.warmup} to warm up",
        [
            Measurement("service (s)", [a for a, _ in timed], 3),
            Measurement("in one process (s)", [b for _, b in timed], 3),
            Measurement("service / one process", [a / b for a, b in timed]),
            Measurement("service, processor (s)", service.busy[options.warmup :], 3),
            Measurement("in one process, processor (s)", local.busy[options.warmup :], 3),
            Measurement("rewards differ by, at most", [max(differences)], 8),
        ],
    )
