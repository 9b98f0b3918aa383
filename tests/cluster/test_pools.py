"""Pools of real actor processes that are killed, hang or raise."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster import stages
from cluster.placement import Role, connect
from cluster.pools import Pool, PoolError, Slot, call
from cluster.settings import ClusterSettings, RunSettings
from cluster.stages import Rewards, Rollouts
from rollout.records import CandidateGroup, Noise, Prompt, Weights

pytestmark = pytest.mark.ray

HERE = "tests.cluster.workers"
PROMPT = Prompt(index=0, text="a photo of a circle")


@pytest.fixture(scope="module", autouse=True)
def node() -> Iterator[None]:
    """A local Ray node of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        connect(ClusterSettings(object_store_gb=0.1))
        yield
        ray.shutdown()


def make_pool(count: int, deadline: float = 60, target: str = "Echo", **arguments: Any) -> Pool:
    return Pool(Role(name="echo", target=f"{HERE}:{target}", arguments=arguments), count, deadline)


async def ask(pool: Pool, method: str, *arguments: Any, on: Slot | None = None) -> Any:
    """A call of the pool, as the stages make it."""

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


def test_arguments_reach_the_worker() -> None:
    async def scenario() -> str:
        answer: str = await ask(make_pool(1, greeting="servus"), "ping")
        return answer

    assert asyncio.run(scenario()) == "servus"


def rewards_of(settings: RunSettings, *listed: dict[str, Any]) -> Rewards:
    found = settings.model_validate({**settings.model_dump(), "rewards": listed})
    return Rewards(found)


def candidate_group(values: list[int]) -> CandidateGroup:
    images = np.array(values, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    noises = tuple(Noise(initial=i, path=i) for i in range(len(values)))
    return CandidateGroup(
        group_id=0, prompt=PROMPT, version=0, noises=noises, images=ray.put(images), conditioning=None,
        trajectories=(), seconds=0.0,
    )  # fmt: skip


def test_a_failed_reward_is_missing_and_never_zero(configure: Any) -> None:
    listed = [{"name": f"{HERE}:Scorer"}, {"name": f"{HERE}:BrokenScorer", "weight": 0.5}]
    rewards = rewards_of(configure(), *listed)
    scores = asyncio.run(rewards.score(candidate_group([3, 5])))
    assert scores.rewards[f"{HERE}:Scorer"].tolist() == [3, 5]
    assert np.isnan(scores.rewards[f"{HERE}:BrokenScorer"]).all()
    assert np.isnan(scores.total).all()
    assert not scores.valid.any()
    assert "the detector is out of order" in rewards.failures[f"{HERE}:BrokenScorer"]


def test_a_failed_reward_of_no_weight_costs_nothing(configure: Any) -> None:
    listed = [{"name": f"{HERE}:Scorer"}, {"name": f"{HERE}:BrokenScorer", "weight": 0}]
    scores = asyncio.run(rewards_of(configure(), *listed).score(candidate_group([3, 5])))
    assert scores.total.tolist() == [3, 5]
    assert scores.valid.all()
    assert np.isnan(scores.rewards[f"{HERE}:BrokenScorer"]).all()


def test_a_reward_past_its_deadline_is_missing(configure: Any) -> None:
    rewards = rewards_of(configure(), {"name": f"{HERE}:HungScorer", "deadline": 0.5})

    async def scenario() -> Any:
        await rewards.pools[f"{HERE}:HungScorer"].ready()
        return await rewards.score(candidate_group([1, 2, 3]))

    scores = asyncio.run(scenario())
    assert np.isnan(scores.total).all()
    assert rewards.pools[f"{HERE}:HungScorer"].restarts == 3
    assert "TimeoutError" in rewards.failures[f"{HERE}:HungScorer"]


@pytest.fixture
def samplers(configure: Any, monkeypatch: pytest.MonkeyPatch) -> Rollouts:
    """The pool of samplers with processes that start at once in the place of a model."""

    def light(**role: Any) -> Role:
        return Role(**{**role, "target": f"{HERE}:FakeSampler"})

    monkeypatch.setattr(stages, "Role", light)
    overrides = {"rollout": {"workers": 1}, "selection": {"candidates": 4, "keep": 2}}
    return Rollouts(configure(**overrides))


def published(version: int) -> Weights:
    flat = ray.put(np.full(1, 10.0 + version, dtype=np.float32))
    return Weights(version=version, checksum=f"checksum of {version}", flat=flat)


def test_a_restarted_sampler_gets_its_weights_before_it_samples(samplers: Rollouts) -> None:
    async def scenario() -> None:
        slot = samplers.pool.slots[0]
        await samplers.load(published(7))
        before = await (await samplers.sample(PROMPT, 3, version=7)).images
        os.kill((await call(slot, "ping", deadline=60))[0], signal.SIGKILL)
        again = await samplers.sample(PROMPT, 3, version=7)
        assert (await again.images).tolist() == before.tolist()
        assert before[:, 2].tolist() == [17.0] * 4
        assert samplers.pool.restarts == 1
        assert slot.holds == "checksum of 7"

    asyncio.run(scenario())


def test_a_group_is_sampled_under_the_version_it_was_admitted_with(samplers: Rollouts) -> None:
    async def scenario() -> None:
        for version in (4, 5):
            await samplers.load(published(version))
        stale = await samplers.sample(PROMPT, 0, version=4)
        assert (await stale.images)[0, 2] == 14.0
        fresh = await samplers.sample(PROMPT, 0, version=5)
        assert (await fresh.images)[0, 2] == 15.0
        averaged = Weights(version=-6, checksum="averaged", flat=ray.put(np.full(1, 99.0)))
        handle = await samplers.evaluate([PROMPT], [Noise(initial=1, path=0)], averaged)
        assert (await handle)[0, 1:].tolist() == [-6, 99.0]
        again = await samplers.sample(PROMPT, 0, version=5)
        assert (await again.images).tolist() == (await fresh.images).tolist()

    asyncio.run(scenario())


def test_only_versions_that_may_still_be_asked_for_are_kept(samplers: Rollouts) -> None:
    async def scenario() -> None:
        for version in range(5):
            await samplers.load(published(version))

    asyncio.run(scenario())
    assert sorted(samplers.published) == [3, 4]
