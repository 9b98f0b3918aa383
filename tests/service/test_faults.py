"""Two replicas that raise, hang, return NaN and are killed, against the same two undisturbed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from cluster.actors import reward_pool as module
from cluster.actors.pool import call
from cluster.actors.rewards import Rewards
from rewards.combine import Scores
from rollout.records import Chunk, Prompt
from selection.selector import Selector

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("node")]

NAME = "tests.support.scorers:FaultyScorer"
GROUPS, CANDIDATES, WINDOW = 200, 16, 8
PER_IMAGE, DEADLINE = 0.03, 1.5
FIRST_KILL, KILL_EVERY = 10.0, 30.0
FAULTS = {"raising": 0.10, "hanging": 0.05, "nan": 0.02}
GRACE = 1.0
"""Seconds that the driver may take to notice that a deadline has passed, on a busy machine."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the driver waited for each call."""
    found: list[float] = []

    async def timed(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return await call(*arguments, **options)
        finally:
            found.append(time.perf_counter() - began)

    monkeypatch.setattr(module, "call", timed)
    return found


@dataclass
class Outcome:
    """The outcome of a run."""

    scores: list[Scores]
    seconds: float
    restarts: int
    killed: list[int]


def values_of(group: int) -> Any:
    """Return the expected scores of a group's candidates, none of them zero."""
    return 1 + (np.arange(CANDIDATES) * 7 + group) % 250


async def one_group(rewards: Rewards, window: asyncio.Semaphore, group: int) -> Scores:
    async def sampled() -> Chunk:
        images = values_of(group).astype(np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
        handle = ray.put(images)
        finite, nothing = (True,) * CANDIDATES, (None,) * CANDIDATES
        return Chunk(images=handle, finite=finite, conditioning=None, trajectories=nothing, seconds=0.0)

    async with window:
        return await rewards.score(Prompt(index=group, text=""), [sampled()])


async def kill_in_turn(killed: list[int]) -> None:
    """Kill one of the replicas regularly, in turn."""
    await asyncio.sleep(FIRST_KILL)
    while True:
        replicas = sorted(p.pid for p in psutil.Process().children(recursive=True) if is_replica(p))
        if replicas:
            killed.append(replicas[len(killed) % len(replicas)])
            os.kill(killed[-1], signal.SIGKILL)
        await asyncio.sleep(KILL_EVERY)


def is_replica(process: psutil.Process) -> bool:
    try:
        return bool(process.name().startswith("ray::WorkerActor"))
    except psutil.NoSuchProcess:
        return False


def go(configure: Any, log: Path, *, faults: bool) -> Outcome:
    options = {"seconds": PER_IMAGE, "log": str(log), **(FAULTS if faults else dict.fromkeys(FAULTS, 0.0))}
    reward = {"name": NAME, "workers": 2, "deadline": DEADLINE, "options": options}
    rewards = Rewards(configure(rewards=[reward]))
    (pool,) = rewards.pools
    killed: list[int] = []

    async def scenario() -> Outcome:
        await pool.ready()
        window = asyncio.Semaphore(WINDOW)
        killer = asyncio.create_task(kill_in_turn(killed) if faults else asyncio.sleep(0))
        began = time.perf_counter()
        scores = await asyncio.gather(*(one_group(rewards, window, group) for group in range(GROUPS)))
        seconds = time.perf_counter() - began
        killer.cancel()
        return Outcome(list(scores), seconds, pool.restarts, killed)

    outcome = asyncio.run(scenario())
    for slot in pool.slots:
        ray.kill(slot.actor)
    return outcome


def test_faults_cost_time_and_nothing_else(configure: Any, tmp_path: Path, waits: list[float]) -> None:
    peaceful = go(configure, tmp_path / "peaceful", faults=False)
    faulty = go(configure, tmp_path / "faulty", faults=True)
    calls = (tmp_path / "faulty").stat().st_size
    missing = sum(not scores.valid.any() for scores in faulty.scores)
    print(
        f"\n{peaceful.seconds:.1f} s in peace, {faulty.seconds:.1f} s with faults, "
        f"{faulty.seconds / peaceful.seconds:.2f} times; {calls} calls, {faulty.restarts} replicas replaced, "
        f"{len(faulty.killed)} killed, {missing} of {GROUPS} groups dropped, longest call {max(waits):.2f} s"
    )
    assert all(scores.valid.all() for scores in peaceful.scores)
    assert_honest(faulty.scores)
    assert_counted(configure, faulty.scores)
    assert faulty.killed
    assert faulty.restarts > len(faulty.killed)
    assert max(waits) < DEADLINE + GRACE
    assert missing <= 0.06 * GROUPS
    assert faulty.seconds <= 1.8 * peaceful.seconds


def assert_honest(found: list[Scores]) -> None:
    """Every score is the expected one or missing; none is zero."""
    assert len(found) == GROUPS
    for group, scores in enumerate(found):
        total = scores.total
        assert not (total == 0).any()
        assert (np.isfinite(total) == scores.valid).all()
        assert total[scores.valid].tolist() == values_of(group)[scores.valid].tolist()


def assert_counted(configure: Any, found: list[Scores]) -> None:
    """Selection uses the valid scores, and counts the groups that it must drop."""
    settings = configure().selection
    selection = Selector(settings, 0).select(0, list(range(GROUPS)), found)
    dropped = sum(scores.valid.sum() < 2 for scores in found)
    assert selection.metrics["dropped_groups"] == dropped
    assert selection.metrics["selected"] == (GROUPS - dropped) * settings.keep
