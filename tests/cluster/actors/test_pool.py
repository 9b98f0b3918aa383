"""Pools of real actor processes that are killed, hang or raise."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.actors.actor_spec import ActorSpec
from cluster.actors.pool import Pool, Slot, call
from cluster.config.errors import PoolError
from rollout.records import Prompt

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("node")]

HERE = "tests.support.workers"
PROMPT = Prompt(index=0, text="a photo of a circle")


def make_pool(count: int, deadline: float = 60, target: str = "Echo", **arguments: Any) -> Pool:
    return Pool(ActorSpec(name="echo", target=f"{HERE}:{target}", arguments=arguments), count, deadline)


async def ask(pool: Pool, method: str, *arguments: Any, on: Slot | None = None) -> Any:
    """Call a method through the pool, as the stages do."""

    async def work(slot: Slot) -> Any:
        return (await call(slot, method, *arguments, deadline=pool.deadline))[0]

    return await pool.run(work, on=on)


async def pid_of(slot: Slot) -> int:
    found: int = (await call(slot, "pid", deadline=60))[0]
    return found


def test_work_goes_to_the_least_busy_actor() -> None:
    async def scenario() -> tuple[list[int], list[int]]:
        pool = make_pool(2)
        await pool.ready()
        every = [await pid_of(slot) for slot in pool.slots]
        return every, await asyncio.gather(*(ask(pool, "pid") for _ in range(2)))

    every, used = asyncio.run(scenario())
    assert sorted(every) == sorted(used)


def test_only_the_first_result_is_fetched() -> None:
    async def scenario() -> list[Any]:
        pool = make_pool(1)
        await pool.ready()
        value, handle = await call(pool.slots[0], "pair", returns=2, deadline=60)
        return [value, handle, await handle]

    value, handle, behind = asyncio.run(scenario())
    assert value == "first"
    assert isinstance(handle, ray.ObjectRef)
    assert behind.tolist() == [0, 1, 2]


def test_work_of_a_killed_actor_is_done_elsewhere() -> None:
    async def scenario() -> None:
        pool = make_pool(2)
        await pool.ready()
        pids = [await pid_of(slot) for slot in pool.slots]
        pending = [asyncio.create_task(ask(pool, "note", number, 1.0)) for number in range(2)]
        await asyncio.sleep(0.3)
        os.kill(pids[0], signal.SIGKILL)
        seen = await asyncio.gather(*pending)
        assert {number for numbers in seen for number in numbers} == {0, 1}
        assert pool.restarts == 1
        assert await pid_of(pool.slots[0]) not in pids
        assert await pid_of(pool.slots[1]) == pids[1]

    asyncio.run(scenario())


def test_an_actor_that_hangs_past_its_deadline_is_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        pool = make_pool(1, deadline=2)
        await pool.ready()
        before = await pid_of(pool.slots[0])
        after = await ask(pool, "sleep_once", str(tmp_path / "asked"), 300.0)
        assert after != before
        assert pool.restarts == 1
        assert not alive(before)

    asyncio.run(scenario())


def test_a_stopped_process_counts_as_hung() -> None:
    async def scenario() -> None:
        pool = make_pool(1, deadline=2)
        await pool.ready()
        before = await pid_of(pool.slots[0])
        os.kill(before, signal.SIGSTOP)
        assert await ask(pool, "ping") == "hello"
        assert await pid_of(pool.slots[0]) != before
        assert pool.restarts == 1

    asyncio.run(scenario())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()


def test_work_survives_the_death_of_every_actor_at_once() -> None:
    async def scenario() -> None:
        pool = make_pool(4)
        await pool.ready()
        pids = [await pid_of(slot) for slot in pool.slots]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert await asyncio.gather(*(ask(pool, "ping") for _ in range(8))) == ["hello"] * 8
        assert pool.restarts == 4

    asyncio.run(scenario())


def test_a_cancelled_wait_gives_its_turn_to_the_next() -> None:
    async def scenario() -> None:
        pool = make_pool(1)
        await pool.ready()
        busy, waiting, last = (asyncio.create_task(ask(pool, "note", n, 0.5)) for n in range(3))
        await asyncio.sleep(0.1)
        assert pool.waiting == 3
        waiting.cancel()
        assert await last == [0, 2]
        assert busy.done()
        assert pool.waiting == 0

    asyncio.run(scenario())


def test_a_slot_works_in_the_order_of_asking() -> None:
    async def scenario() -> list[int]:
        pool = make_pool(1)
        slot = pool.slots[0]
        waits = [0.3, 0.0, 0.1, 0.0, 0.0]
        done = [ask(pool, "note", number, wait, on=slot) for number, wait in enumerate(waits)]
        seen: list[int] = (await asyncio.gather(*done))[-1]
        return seen

    assert asyncio.run(scenario()) == [0, 1, 2, 3, 4]


def test_a_worker_that_always_raises_gives_its_own_error() -> None:
    async def scenario() -> None:
        pool = make_pool(1)
        with pytest.raises(PoolError, match=r"^echo: failed 3 times: ValueError: no such luck$"):
            await ask(pool, "fail", "no such luck")
        assert pool.restarts == 0
        assert await ask(pool, "ping") == "hello"

    asyncio.run(scenario())


def test_a_worker_that_cannot_be_built_gives_its_own_error() -> None:
    with pytest.raises(PoolError, match=r"FileNotFoundError: weights\.bin is not there") as caught:
        asyncio.run(make_pool(1, target="Unbuildable").ready())
    assert "\n" not in str(caught.value)


def test_an_actor_that_is_killed_while_it_starts_is_started_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        pool = make_pool(2, target="DiesOnce", marker=str(tmp_path / "started"))
        await pool.ready()
        assert len(pool.up) == 2
        assert pool.restarts == 1

    asyncio.run(scenario())


def test_an_actor_gets_the_environment_of_its_role() -> None:
    runtime_env = {"env_vars": {"OWN_TOKEN": "7", "TOKENIZERS_PARALLELISM": "true"}}
    spec = ActorSpec(name="echo", target=f"{HERE}:Echo", threads=3, runtime_env=runtime_env)

    async def scenario() -> list[str]:
        pool = Pool(spec, 1, 60)
        names = ("OWN_TOKEN", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
        return [await ask(pool, "variable", name) for name in names]

    assert asyncio.run(scenario()) == ["7", "3", "true"]


def test_arguments_reach_the_worker() -> None:
    async def scenario() -> str:
        answer: str = await ask(make_pool(1, greeting="servus"), "ping")
        return answer

    assert asyncio.run(scenario()) == "servus"
