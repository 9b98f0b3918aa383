"""The loop by itself: who is admitted when, under which version, and how a stop ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import loop
from cluster.loop import Run, train


class Recorder:
    """Stands in for stages, folder and checkpoints, and writes down what the loop does."""

    def __init__(self) -> None:
        self.rollouts = self.learner = self
        self.loaded: list[int] = []
        self.committed: list[int] = []
        self.tracked: list[dict[str, Any]] = []
        self.admitted: list[tuple[int, int]] = []
        self.batches: list[list[int]] = []

    async def publish(self, version: int, *, averaged: bool = False) -> int:
        return -1 if averaged else version

    async def load(self, version: int) -> None:
        self.loaded.append(version)

    async def commit(self, step: int, learner: Any) -> None:
        self.committed.append(step)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()

    async def produce(run: Run, group_id: int, *, version: int) -> int:
        made.admitted.append((group_id, version))
        await asyncio.sleep(0.001 * (group_id % 3))
        return group_id

    async def train_step(run: Run, step: int, batch: list[int], began: float) -> dict[str, Any]:
        made.batches.append(batch)
        return {"step": step + 1}

    async def evaluate(*arguments: Any) -> dict[str, float]:
        return {"eval_reward": 0.5}

    monkeypatch.setattr(loop, "produce", produce)
    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    return made


@pytest.fixture
def go(record: Recorder, configure: Any) -> Callable[..., int]:
    """Run the loop from a step; ``stop_at`` asks it to stop once that step is tracked."""

    def run_loop(start: int = 0, stop_at: int | None = None, **overrides: Any) -> int:
        stand_in: Any = record

        async def scenario() -> int:
            run: Run

            def track(metrics: dict[str, Any]) -> None:
                record.tracked.append(metrics)
                if metrics["step"] == stop_at:
                    run.stop.set()

            settings = configure(groups_per_step=2, **overrides)
            run = Run(settings, SimpleNamespace(), (), [], stand_in, stand_in, [track])  # type: ignore[arg-type]
            return await train(run, start)

        return asyncio.run(scenario())

    return run_loop


def test_lockstep_admits_a_batch_per_version_and_keeps_the_order(go: Any, record: Recorder) -> None:
    assert go(steps=3) == 3
    assert record.admitted == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert record.batches == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("staleness", [1, 2])
def test_staleness_never_exceeds_its_bound(go: Any, record: Recorder, staleness: int) -> None:
    go(steps=7, max_staleness=staleness)
    versions = dict(record.admitted)
    lags = [step - versions[group] for step, batch in enumerate(record.batches) for group in batch]
    assert max(lags) == staleness
    assert [group for batch in record.batches for group in batch] == list(range(14))


def test_evaluations_and_checkpoints_come_when_due_and_at_the_end(go: Any, record: Recorder) -> None:
    go(steps=7, eval_every=3, checkpoint_every=2)
    assert [line["step"] for line in record.tracked] == list(range(8))
    assert [line["step"] for line in record.tracked if "eval_reward" in line] == [0, 3, 6, 7]
    assert record.committed == [2, 4, 6, 7]


def test_a_resumed_loop_goes_on_where_it_stopped(go: Any, record: Recorder) -> None:
    assert go(start=4, steps=6) == 6
    assert record.loaded == [4]
    assert record.admitted == [(8, 4), (9, 4), (10, 5), (11, 5)]
    assert [line["step"] for line in record.tracked] == [5, 6]


@pytest.mark.parametrize(("stop_at", "last"), [(0, 1), (1, 1), (4, 4), (9, 9)])
def test_a_stop_ends_the_step_and_commits_a_checkpoint(
    go: Any, record: Recorder, stop_at: int, last: int
) -> None:
    assert go(steps=9, stop_at=stop_at, checkpoint_every=100, max_staleness=1) == last
    assert record.committed == [last]


def test_a_crash_of_a_producer_ends_the_loop_as_itself(
    go: Any, record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(run: Run, group_id: int, *, version: int) -> None:
        raise LookupError("the pool is empty")

    monkeypatch.setattr(loop, "produce", crash)
    with pytest.raises(ExceptionGroup) as caught:
        go(steps=3)
    assert caught.group_contains(LookupError, match="the pool is empty")
    assert not record.batches
