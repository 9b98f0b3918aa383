"""A reward behind a server that goes away: the run waits for its return, and loses no score."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import ray

from cluster.shards import Broken, Shards, Span
from rewards.scorer import Judgement
from rewards.settings import RewardSettings
from rollout.records import Prompt
from tests.cluster.service import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("node")]

SCORER = "tests.cluster.scorers:Scorer"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def serve(port: int) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start the server, every time on the same port."""
    started: list[subprocess.Popen[bytes]] = []

    def begin() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rewards.serve", SCORER, "--port", str(port)]
        started.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL))
        until = time.monotonic() + 60
        while not answers(port):
            assert time.monotonic() < until
            time.sleep(0.1)
        return started[-1]

    yield begin
    for server in started:
        server.kill()
        server.wait()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


async def judged(shards: Shards, values: list[int]) -> Judgement:
    images = np.array(values, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    return await shards.judge(
        [Span(images=ray.put(images), prompts=(Prompt(index=0, text=""),) * len(values))]
    )


def shards_of(port: int, deadline: float) -> Shards:
    reward = {"name": "remote", "options": {"url": f"http://127.0.0.1:{port}"}, "batch": 2, "workers": 2}
    return Shards(RewardSettings(**reward, deadline=deadline, attempts=2), groupwise=False)


def test_a_server_that_goes_away_and_returns_costs_time_and_no_score(serve: Any, port: int) -> None:
    async def scenario() -> Judgement:
        server, shards = serve(), shards_of(port, deadline=30)
        assert (await judged(shards, [7])).values.tolist() == [7]
        server.kill()
        server.wait()
        waiting = asyncio.ensure_future(judged(shards, [1, 2, 3, 4, 5, 6]))
        await asyncio.sleep(4)  # more than two attempts take
        assert not waiting.done()
        await asyncio.to_thread(serve)
        judgement = await waiting
        assert not shards.failure
        return judgement

    judgement = asyncio.run(scenario())
    assert judgement.valid.all()
    assert judgement.values.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_run_with_its_own_error(serve: Any, port: int) -> None:
    async def scenario() -> None:
        server, shards = serve(), shards_of(port, deadline=2)
        await judged(shards, [7])
        server.kill()
        await judged(shards, [1, 2])

    with pytest.raises(
        Broken, match=r"none succeeded: Unavailable: reward 'remote' failed: .*did not answer"
    ):
        asyncio.run(asyncio.wait_for(scenario(), 60))
