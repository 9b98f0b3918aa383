"""The events of a run: one JSON line each, with run, step, group and worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from cluster.actors import pool as pools
from cluster.actors.actor_spec import ActorSpec
from cluster.actors.pool import Pool, Slot
from cluster.config.errors import PoolError
from cluster.config.version import commit, version
from cluster.record.checkpoints import Checkpoints
from cluster.record.events import GROUP, STEP, note, recording, warn, watch
from cluster.record.names import LOG
from tests.support.saving import SavingLearner


@pytest.fixture
def events(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """Return the events without their times."""

    def read() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
        for line in lines:
            assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
        return lines

    return read


def test_a_log_says_who_where_and_when(tmp_path: Path, events: Callable[[], list[dict[str, Any]]]) -> None:
    async def produce(group: int) -> None:
        GROUP.set(group)
        await asyncio.sleep(0)
        warn("call failed", worker=f"rollout-{group}")

    async def run() -> None:
        STEP.set(7)
        async with asyncio.TaskGroup() as tasks:
            for group in (3, 4):
                tasks.create_task(produce(group))
        await asyncio.to_thread(note, "checkpoint committed", checkpoint=7)

    with recording(tmp_path, "shapes-1", after_step=0):
        asyncio.run(run())
    begin, one, two, saved, end = events()
    ours = {"version": version(), "commit": commit() or None}
    assert begin == {"level": "info", "event": "run started", "run": "shapes-1", "after_step": 0, **ours}
    told = {"level": "warning", "event": "call failed", "run": "shapes-1", "step": 7}
    assert one == {**told, "group": 3, "worker": "rollout-3"}
    assert two == {**told, "group": 4, "worker": "rollout-4"}
    assert saved["checkpoint"] == saved["step"] == 7
    assert "group" not in saved
    assert end["event"] == "run ended"


def test_a_log_goes_on_where_a_run_does(tmp_path: Path, events: Callable[[], list[dict[str, Any]]]) -> None:
    group = ExceptionGroup("two", [PoolError("rollout: failed 3 times"), ValueError()])
    with pytest.raises(ExceptionGroup), recording(tmp_path, "shapes-1"):
        raise group
    with recording(tmp_path, "shapes-1", after_step=4):
        pass
    note("nobody hears this")
    assert [line["event"] for line in events()] == ["run started", "run failed", "run started", "run ended"]
    assert events()[1]["reason"] == "PoolError: rollout: failed 3 times; ValueError"
    assert events()[1]["level"] == "error"


def test_what_a_step_says_of_itself(tmp_path: Path, events: Callable[[], list[dict[str, Any]]]) -> None:
    fine = {
        "step": 1,
        "candidates": 8.0,
        "valid": 8.0,
        "selected": 4.0,
        "dropped_groups": 0.0,
        "broken_images": 0,
    }
    bad = {
        "step": 2, "candidates": 8.0, "valid": 6.0, "selected": 0.0, "dropped_groups": 1.0,
        "skipped_updates": 2.0, "broken_images": 2, "eval_broken_images": 3,
        "alarms": {"image_jpeg_size": "fell by 40%"},
    }  # fmt: skip
    with recording(tmp_path, "shapes-1"):
        for line in ({"step": 0, "eval_reward": 0.5}, {**fine, "skipped_updates": None}, bad):
            watch(line)
    found = [{k: v for k, v in line.items() if k not in ("level", "run")} for line in events()[1:-1]]
    assert found == [
        {"event": "guard alarm", "metric": "image_jpeg_size", "story": "fell by 40%"},
        {"event": "images not finite", "count": 2},
        {"event": "held-out images not finite", "count": 3},
        {"event": "groups dropped", "count": 1},
        {"event": "updates skipped", "count": 2},
        {"event": "rewards missing", "count": 2},
        {"event": "no margin in the whole batch"},
    ]


def test_pools_tell_of_lost_actors(
    tmp_path: Path, events: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "spawn", lambda role, number: object())
    monkeypatch.setattr(pools.ray, "kill", lambda actor, no_restart: None)
    failed = RayTaskError("work", "", ValueError("not today"))
    lost = [ActorUnavailableError("the node went away", None), TimeoutError("no answer"), failed]

    async def work(slot: Slot) -> str:
        if lost:
            raise lost.pop(0)
        return "done"

    async def start(slot: Slot) -> None:
        slot.started = True

    async def run() -> None:
        pool = Pool(ActorSpec(name="rollout", target="a:B"), 1, deadline=1, attempts=4)
        monkeypatch.setattr(Slot, "start", start)
        assert await pool.run(work) == "done"

    with recording(tmp_path, "shapes-1"):
        asyncio.run(run())
    found = [(line["event"], line["worker"], line["reason"]) for line in events()[1:-1]]
    assert found == [
        ("actor replaced", "rollout-0", found[0][2]),
        ("actor replaced", "rollout-0", "TimeoutError: no answer"),
        ("call failed", "rollout-0", "ValueError: not today"),
    ]
    assert "the node went away" in found[0][2]


def test_checkpoints_tell_when_they_are_committed_and_restored(
    tmp_path: Path, events: Callable[[], list[dict[str, Any]]]
) -> None:
    async def run() -> None:
        learner: Any = SavingLearner()
        checkpoints = Checkpoints(str(tmp_path / "checkpoints"), 2)
        await checkpoints.commit(4, learner)
        await checkpoints.settle(learner, wait=True)
        await checkpoints.restore(4, learner)

    with recording(tmp_path, "shapes-1"):
        asyncio.run(run())
    assert [(line["event"], line["checkpoint"]) for line in events()[1:-1]] == [
        ("checkpoint committed", 4),
        ("checkpoint restored", 4),
    ]
