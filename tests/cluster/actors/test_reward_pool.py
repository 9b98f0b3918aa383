"""RewardPool without Ray: its calls, and missing scores."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayTaskError

from cluster.actors import reward_pool as module
from cluster.actors.reward_pool import RewardPool
from cluster.config.errors import PoolError
from cluster.record.events import recording
from rewards.scorer import Judgement, Unavailable
from rewards.settings import RewardSettings
from rewards.spans import Span
from rollout.records import Prompt


class FakePool:
    """A pool that runs work at once, and records its calls."""

    def __init__(self, *arguments: Any) -> None:
        self.calls: list[list[tuple[int, int]]] = []
        self.running = self.most = 0
        self.fails: Callable[[int], bool] = lambda number: False

    async def run(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await work(SimpleNamespace())
        finally:
            self.running -= 1

    once = run

    async def call(
        self, slot: Any, method: str, ranges: Any, prompts: Any, *images: Any, deadline: float
    ) -> list[Any]:
        self.calls.append(list(ranges))
        number = len(self.calls)
        await asyncio.sleep(0.01)
        if self.fails(number):
            raise PoolError(f"call {number} failed")
        values = [10 * handle + i for handle, (a, b) in zip(images, ranges, strict=True) for i in range(a, b)]
        assert len(values) == len(prompts)
        return [Judgement(values=np.array(values, float), valid=np.ones(len(values), bool))]


Make = Callable[..., tuple[RewardPool, FakePool]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """A reward pool over a pool that answers 10 * handle + position."""

    def build(
        *, groupwise: bool = False, watches: bool = False, **settings: Any
    ) -> tuple[RewardPool, FakePool]:
        pool = FakePool()
        monkeypatch.setattr(module, "Pool", lambda *arguments: pool)
        monkeypatch.setattr(module, "call", pool.call)
        reward = RewardSettings(name="jpeg", **settings)
        return RewardPool(reward, groupwise=groupwise, watches=watches), pool

    return build


def span(handle: int, count: int) -> Span:
    return Span(images=handle, prompts=tuple(Prompt(index=i, text="") for i in range(count)))


def judged(replicas: RewardPool, *groups: Sequence[Span]) -> list[list[float]]:
    async def scenario() -> list[Judgement]:
        return await asyncio.gather(*(replicas.score(spans) for spans in groups))

    return [judgement.values.tolist() for judgement in asyncio.run(scenario())]


def test_images_are_split_into_calls_and_put_together_in_order(make: Make) -> None:
    replicas, pool = make(batch=3, workers=2)
    assert judged(replicas, [span(1, 8)]) == [list(range(10, 18))]
    assert pool.calls == [[(0, 3)], [(3, 6)], [(6, 8)]]
    assert pool.most == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_the_cut_does_not_depend_on_replicas_or_company(make: Make, workers: int) -> None:
    replicas, pool = make(batch=4, workers=workers)
    judged(replicas, [span(1, 6)], [span(2, 6)])
    assert sorted(pool.calls) == [[(0, 4)], [(0, 4)], [(4, 6)], [(4, 6)]]
    assert pool.most == workers


def test_a_group_that_is_judged_as_one_is_never_cut(make: Make) -> None:
    replicas, pool = make(batch=3, groupwise=True)
    assert judged(replicas, [span(1, 4), span(2, 2)]) == [[10, 11, 12, 13, 20, 21]]
    assert pool.calls == [[(0, 4), (0, 2)]]


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), batch=st.integers(1, 8))
def test_every_image_is_scored_once_whatever_the_cut(sizes: list[int], batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        pool = FakePool()
        patch.setattr(module, "Pool", lambda *arguments: pool)
        patch.setattr(module, "call", pool.call)
        replicas = RewardPool(
            RewardSettings(name="jpeg", batch=batch, workers=2),
            groupwise=False,
        )
        found = judged(replicas, *([span(handle, size)] for handle, size in enumerate(sizes)))
    assert found == [[10 * handle + i for i in range(size)] for handle, size in enumerate(sizes)]
    assert max(sum(b - a for a, b in call) for call in pool.calls) <= batch


def test_a_call_that_fails_leaves_only_its_own_images_missing(make: Make) -> None:
    replicas, pool = make(batch=2)
    pool.fails = lambda number: number == 2
    (values,) = judged(replicas, [span(1, 6)])
    assert np.isnan(values).tolist() == [False, False, True, True, False, False]
    assert replicas.failure == "call 2 failed"


def test_a_call_whose_server_is_away_though_it_answers_others_ends(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AWAY", 0.0)
    replicas, pool = make(workers=2)
    attempts = 0

    async def retrying(work: Callable[[Any], Awaitable[Any]]) -> Any:
        nonlocal attempts
        for _ in range(3):
            attempts += 1
            with suppress(RayTaskError):
                return await work(SimpleNamespace())
        raise PoolError("failed 3 times")

    async def answer(slot: Any, method: str, ranges: Any, prompts: Any, handle: int, deadline: float) -> Any:
        await asyncio.sleep(0.001)
        if handle == 1:
            raise RayTaskError("score_ranges", "", Unavailable("answered 503"))
        return [Judgement(values=np.ones(1), valid=np.ones(1, bool))]

    monkeypatch.setattr(pool, "run", retrying)
    monkeypatch.setattr(module, "call", answer)

    async def scenario() -> Judgement:
        stuck = asyncio.ensure_future(replicas.score([span(1, 1)]))
        while not stuck.done():
            assert (await replicas.score([span(2, 1)])).valid.all()
        return await stuck

    assert not asyncio.run(asyncio.wait_for(scenario(), 10)).valid.any()
    assert attempts > 3
    assert replicas.failure == "failed 3 times"


def test_a_watching_reward_that_is_away_is_tried_once_per_evaluation(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas, _ = make(watches=True)
    away, asked = [True], []

    async def answer(slot: Any, method: str, ranges: Any, prompts: Any, handle: int, deadline: float) -> Any:
        asked.append(handle)
        if away[0]:
            raise RayTaskError("score_ranges", "", Unavailable("answered 503"))
        return [Judgement(values=np.ones(1), valid=np.ones(1, bool))]

    monkeypatch.setattr(module, "call", answer)
    assert replicas.outage
    groups = [[span(handle, 1)] for handle in range(4)]
    assert np.isnan(judged(replicas, *groups)).all()
    assert len(asked) == 1
    assert "answered 503" in replicas.outage.new_reason()
    replicas.outage.retry()
    assert np.isnan(judged(replicas, *groups)).all()
    assert len(asked) == 2
    assert not replicas.outage.new_reason()
    away[0] = False
    assert np.isnan(judged(replicas, *groups)).all()
    replicas.outage.retry()
    assert judged(replicas, *groups) == [[1.0]] * 4
    away[0] = True
    assert np.isnan(judged(replicas, *groups)).all()
    assert "answered 503" in replicas.outage.new_reason()


def test_a_score_outside_its_range_is_one_event_and_stands(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replicas, _ = make(batch=1)

    async def answer(slot: Any, method: str, ranges: Any, prompts: Any, handle: int, deadline: float) -> Any:
        remark = f"scored {ranges[0][0]}, but declares 0 to 1" if ranges[0][0] > 1 else ""
        values = np.array([float(ranges[0][0])])
        return [Judgement(values=values, valid=np.ones(1, bool), remark=remark)]

    monkeypatch.setattr(module, "call", answer)
    with recording(tmp_path, "run"):
        assert judged(replicas, [span(1, 4)]) == [[0, 1, 2, 3]]
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "score out of range"]
    assert (told["reward"], told["reason"]) == ("jpeg", "scored 2, but declares 0 to 1")
