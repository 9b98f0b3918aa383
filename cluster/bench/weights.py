"""Benchmark the broadcast of full weights from the learner to the samplers: its time and its memory.

A random model of 50 M parameters (218 MB in float32) is sent in parts to two samplers. It is compared, in
turns, with plain copies of an array of the same size to two processes: one object each, one after the other,
and one object for both, at once. Memory is the peak of a process's private memory (RssAnon) minus that before
the first transfer, without the store's shared pages.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray
from numpy.typing import NDArray

from cluster.actors.actor_spec import ActorSpec, spawn
from cluster.actors.connection import connect
from cluster.actors.learner import Learner
from cluster.actors.samplers import Samplers
from cluster.bench.table import BenchmarkReport, Measurement, refuse_arguments
from cluster.config.settings import ClusterSettings, RunSettings
from cluster.config.sources import resolve
from cluster.process import private_bytes
from rollout.records import WeightsId
from rollout.tiny.build import World, build_world

SAMPLERS: Final = 2
PART_MB: Final = 128
WARMUP: Final = 5
"""Transfers before the measured ones: touching pages of the store for the first time takes long."""
MODEL: Final = World(size=(32, 32), tokens=14, layers=6, width=512)


class Plain:
    """A worker that only sends or receives one array through the object store."""

    def __init__(self, count: int) -> None:
        """Allocate ``count`` float32 values."""
        self.array = np.ones(count, dtype=np.float32)

    def send(self) -> NDArray[np.float32]:
        """Return the array, which Ray copies into its store."""
        return self.array

    def receive(self, array: NDArray[np.float32]) -> int:
        """Copy an array from the store."""
        np.copyto(self.array, array)
        return len(array)


async def peaks(pids: Sequence[int], work: Callable[[], Awaitable[Any]]) -> tuple[float, list[float]]:
    """Measure the seconds of some work, and the peak private memory of each process meanwhile, in MB."""
    highest = [private_bytes(pid) / 1e6 for pid in pids]
    began = time.perf_counter()
    task = asyncio.ensure_future(work())
    while not task.done():
        highest = [max(high, private_bytes(pid) / 1e6) for high, pid in zip(highest, pids, strict=True)]
        await asyncio.wait([task], timeout=0.005)
    await task
    return time.perf_counter() - began, highest


def _settings(folder: Path) -> RunSettings:
    build_world(MODEL, seed=0).save_pretrained(folder)
    overrides = {
        "model": {"path": str(folder)},
        "rollout": {"workers": SAMPLERS},
        "learner": {"bucket_mb": PART_MB, "threads": 1},
    }
    return resolve("shapes", overrides)


async def _measure(settings: RunSettings, repeats: int) -> BenchmarkReport:
    samplers, learner = Samplers(settings), Learner(settings)
    await asyncio.gather(samplers.pool.ready(), learner.join())
    actors: list[Any] = [learner.actors[0], *(slot.actor for slot in samplers.pool.slots)]
    pids = [int(pid) for pid in await asyncio.gather(*(actor.pid.remote() for actor in actors))]
    before = [private_bytes(pid) / 1e6 for pid in pids]
    size = sum([len(await part) for part in (await learner.publish(WeightsId(0))).parts])
    plain: list[Any] = [
        spawn(
            ActorSpec(name="plain", target="cluster.bench.weights:Plain", arguments={"count": size}), number
        )
        for number in range(1 + SAMPLERS)
    ]

    async def copy_plainly() -> None:
        sent = plain[0].call.remote("send")
        await asyncio.gather(*(actor.call.remote("receive", sent) for actor in plain[1:]))

    async def copy_one_by_one() -> None:
        for actor in plain[1:]:
            await actor.call.remote("receive", plain[0].call.remote("send"))

    async def transfer(version: int) -> None:
        await samplers.load(await learner.publish(WeightsId(version)))

    seconds: list[tuple[float, ...]] = []
    memory: list[list[float]] = []
    for repeat in range(repeats + WARMUP):
        shared, _ = await peaks([], copy_plainly)
        apart, _ = await peaks([], copy_one_by_one)
        whole, highest = await peaks(pids, partial(transfer, repeat))
        if repeat >= WARMUP:
            seconds.append((whole, apart, shared))
            memory.append([high - low for high, low in zip(highest, before, strict=True)])
    return _report(size, seconds, memory)


def _report(
    size: int, seconds: Sequence[tuple[float, ...]], memory: Sequence[Sequence[float]]
) -> BenchmarkReport:
    rows = {
        "weights (s)": [whole for whole, _, _ in seconds],
        "two plain copies, one after the other (s)": [apart for _, apart, _ in seconds],
        "ratio": [whole / apart for whole, apart, _ in seconds],
        "two plain copies of one object, at once (s)": [shared for _, _, shared in seconds],
        "ratio to these": [whole / shared for whole, _, shared in seconds],
        "learner's peak over its start (MB)": [grown[0] for grown in memory],
        "samplers' peak over their start (MB)": [max(grown[1:]) for grown in memory],
    }
    title = f"{size * 4 / 1e6:.0f} MB to {SAMPLERS} samplers"
    return BenchmarkReport(title, [Measurement(name, values) for name, values in rows.items()])


def options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--repeats", type=int, default=3)


def measure(options: argparse.Namespace, rest: Sequence[str]) -> BenchmarkReport:
    """Measure on a local node."""
    refuse_arguments(rest)
    connect(ClusterSettings())
    try:
        with tempfile.TemporaryDirectory() as folder:
            return asyncio.run(_measure(_settings(Path(folder)), options.repeats))
    finally:
        ray.shutdown()
