"""A step of the service against the same step of the same loop in one process, without Ray.

Both train from the same seeds and take turns, step by step, so that rewards must not differ. Every key of the
configuration can be overridden.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from cluster.actors.connection import connect
from cluster.actors.stages import start_stages
from cluster.bench.table import Report, Row
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
    """An observer that lets a run go on only while it has the turn, and measures its steps."""

    def __init__(self, turn: asyncio.Lock) -> None:
        """Runs that share a lock alternate, since it is fair."""
        self.turn = turn
        self.seconds: list[float] = []
        self.rewards: list[NDArray[np.float64]] = []
        self._began = 0.0

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Take the time of a step, give the turn away and wait for it."""
        if made is not None:
            self.seconds.append(time.perf_counter() - self._began)
            self.rewards.append(np.stack([one.scores.total for one in made.batch]))
            self.turn.release()
        if step < run.settings.steps:
            await self.turn.acquire()
            self._began = time.perf_counter()


async def overhead(settings: RunSettings, inputs: Inputs, folder: Path) -> tuple[Turns, Turns]:
    """Train with the service and in this process, in turns."""
    service = start_stages(settings)
    await service.ready()
    local = LocalStages(settings, load_scorers(settings))
    turn = asyncio.Lock()
    found = Turns(turn), Turns(turn)

    def go(stages: Stages, *observers: Observer) -> Any:
        return train(Run(settings, inputs.train, stages, consecutive(settings), observers), 0)

    await asyncio.gather(go(service, Ledger(RunFolder(folder)), found[0]), go(local, found[1]))
    return found


def options(parser: argparse.ArgumentParser) -> None:
    """What can be said about it."""
    parser.add_argument("preset", nargs="?", default="shapes")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")


def measure(options: argparse.Namespace, rest: Sequence[str]) -> Report:
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
    return Report(
        f"{len(timed)} steps of {options.preset}, {options.warmup} to warm up",
        [
            Row("service (s)", [a for a, _ in timed], 3),
            Row("in one process (s)", [b for _, b in timed], 3),
            Row("service / one process", [a / b for a, b in timed]),
            Row("rewards differ by, at most", [max(differences)], 8),
        ],
    )
