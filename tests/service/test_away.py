"""A reward whose server is unavailable for a time: the run waits for it, and loses no score."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
import ray
from numpy.typing import NDArray

from cluster.actors.reward_pool import Broken, RewardPool
from cluster.actors.rewards import Rewards
from rewards.scorer import Judgement
from rewards.settings import RewardSettings
from rewards.spans import Span
from rollout.records import Chunk, Prompt
from tests.support.ports import free_port
from tests.support.service_process import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("node")]

SCORER = "tests.support.scorers:Scorer"
PROMPT = Prompt(index=0, text="")


@pytest.fixture
def port() -> int:
    return free_port()


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


async def judged(replicas: RewardPool, values: list[int], prompt: Prompt = PROMPT) -> Judgement:
    return await replicas.score([Span(images=ray.put(images_of(values)), prompts=(prompt,) * len(values))])


def images_of(values: list[int]) -> NDArray[np.uint8]:
    return np.array(values, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)


def replicas_of(port: int, deadline: float, timeout: float = 60.0, **keys: Any) -> RewardPool:
    options = {"url": f"http://127.0.0.1:{port}", "timeout": timeout}
    reward = {"name": "remote", "options": options, "batch": 2, "workers": 2, "attempts": 2, **keys}
    return RewardPool(RewardSettings(**reward, deadline=deadline), groupwise=False)


def test_a_server_that_goes_away_and_returns_costs_time_and_no_score(serve: Any, port: int) -> None:
    async def scenario() -> Judgement:
        server, replicas = serve(), replicas_of(port, deadline=30)
        assert (await judged(replicas, [7])).values.tolist() == [7]
        server.kill()
        server.wait()
        waiting = asyncio.ensure_future(judged(replicas, [1, 2, 3, 4, 5, 6]))
        await asyncio.sleep(4)  # more than two attempts take
        assert not waiting.done()
        await asyncio.to_thread(serve)
        judgement = await waiting
        assert not replicas.failure
        return judgement

    judgement = asyncio.run(scenario())
    assert judgement.valid.all()
    assert judgement.values.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_run_with_its_own_error(serve: Any, port: int) -> None:
    async def scenario() -> None:
        server, replicas = serve(), replicas_of(port, deadline=2)
        await judged(replicas, [7])
        server.kill()
        await judged(replicas, [1, 2])

    with pytest.raises(
        Broken, match=r"none succeeded: Unavailable: reward 'remote' failed: .*did not answer"
    ):
        asyncio.run(asyncio.wait_for(scenario(), 60))


class HangingAtOnePrompt(BaseHTTPRequestHandler):
    """A server that is ready, scores every image 9, and never answers the prompt "hang"."""

    traits: ClassVar[dict[str, Any]] = {
        "low": 0.0, "high": 9.0, "thread_safe": True, "needs_gpu": False, "groupwise": False,
    }  # fmt: skip

    def do_GET(self) -> None:
        self._say({"version": 1, "name": "nine", "ready": True, "traits": self.traits})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompts"]
        if any(prompt["text"] == "hang" for prompt in asked):
            time.sleep(60)
        self._say({"version": 1, "values": [9.0] * len(asked), "valid": [True] * len(asked), "details": {}})

    def _say(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(BrokenPipeError):
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hanging() -> Iterator[int]:
    """The port of a server that is ready and cannot answer one prompt."""
    with ThreadingHTTPServer(("127.0.0.1", 0), HangingAtOnePrompt) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


HANG = Prompt(index=1, text="hang")


def test_a_prompt_that_a_ready_server_cannot_answer_is_missing_and_ends_nothing(hanging: int) -> None:
    async def scenario() -> None:
        # The four calls of the prompt take longer than a reward may go without a success.
        replicas = replicas_of(hanging, deadline=2.0, timeout=0.9, workers=1)
        assert (await judged(replicas, [7])).values.tolist() == [9]
        lost = await judged(replicas, [1, 2, 3, 4, 5, 6, 7, 8], HANG)
        assert np.isnan(lost.values).all()
        assert not lost.valid.any()
        assert "did not answer: ReadTimeout" in replicas.failure
        assert "its /health says that it is ready" in replicas.failure
        assert (await judged(replicas, [7])).values.tolist() == [9]

    asyncio.run(asyncio.wait_for(scenario(), 90))


def test_others_are_scored_while_a_prompt_hangs(hanging: int) -> None:
    async def scenario() -> None:
        replicas = replicas_of(hanging, deadline=8.0, timeout=1.0)
        await judged(replicas, [7])
        lost = asyncio.ensure_future(judged(replicas, [1, 2], HANG))
        while not lost.done():
            assert (await judged(replicas, [3, 4])).values.tolist() == [9, 9]
            await asyncio.sleep(0.1)
        assert not lost.result().valid.any()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_watching_reward_whose_server_dies_is_missing_until_an_evaluation_finds_it_again(
    serve: Any, port: int, configure: Any
) -> None:
    trained = {"name": "trained", "scorer": SCORER}
    watching = {
        "name": "style", "scorer": "remote", "weight": 0.0, "batch": 1,
        "options": {"url": f"http://127.0.0.1:{port}"},
    }  # fmt: skip

    async def evaluated(rewards: Rewards, values: list[int]) -> list[float]:
        """Evaluate; the trained reward is valid whatever happens to the other."""
        rewards.retry_paused()
        finite = (True,) * len(values)
        scores = await rewards.score_held_out(ray.put(images_of(values)), (PROMPT,) * len(values), finite)
        assert scores.rewards["trained"].tolist() == scores.total.tolist() == values
        return list(scores.rewards["style"])

    async def scenario() -> None:
        server = await asyncio.to_thread(serve)
        settings = configure()
        listed = {"rewards": [trained, watching], "eval_rewards": [trained, watching]}
        rewards = Rewards(settings.model_validate({**settings.model_dump(), **listed}))
        await asyncio.gather(*(pool.ready() for pool in rewards.pools))
        assert await evaluated(rewards, [1, 2]) == [1, 2]
        assert rewards.alarms() == {}
        server.kill()
        server.wait()
        began = time.monotonic()
        assert np.isnan(await evaluated(rewards, [3, 4])).all()
        assert np.isnan(await evaluated(rewards, [3, 4])).all()
        assert time.monotonic() - began < 10  # of default deadlines of 120 s
        ((metric, story),) = rewards.alarms().items()
        assert metric == "eval_style"
        assert re.match(r"is missing: reward 'style': 1 call in \d s and none succeeded: Unavailable", story)
        assert rewards.alarms() == {}
        assert not rewards.failures
        scores = await rewards.score(PROMPT, [chunk_of([5, 6])])
        assert scores.valid.all()
        assert np.isnan(scores.rewards["style"]).all()
        await asyncio.to_thread(serve)
        assert np.isnan((await rewards.score(PROMPT, [chunk_of([5, 6])])).rewards["style"]).all()
        assert await evaluated(rewards, [7, 8]) == [7, 8]
        assert (await rewards.score(PROMPT, [chunk_of([5, 6])])).rewards["style"].tolist() == [5, 6]

    asyncio.run(asyncio.wait_for(scenario(), 120))


async def chunk_of(values: list[int]) -> Chunk:
    handles = (None,) * len(values)
    return Chunk(
        images=ray.put(images_of(values)), conditioning=None, trajectories=handles, seconds=0.0,
        finite=(True,) * len(values),
    )  # fmt: skip
