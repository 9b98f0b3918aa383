"""The drift guard: drift, alarms, and the pause of a run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.settings import GuardSettings
from cluster.loop.drift_guard import DriftGuard, image_metrics, watching_rewards
from cluster.loop.loop import train
from tests.support.fake_stages import FakeStages, course

HELD_OUT = "eval_clip"


def alarms(values: list[float | None], name: str = "image_color_entropy", **settings: Any) -> dict[int, str]:
    """Return the steps of a metric's alarms, and their messages."""
    guard = DriftGuard(GuardSettings(**{"change": 0.5, **settings}), [HELD_OUT])
    looked = [(step, guard.look({"step": step, name: value})) for step, value in enumerate(values)]
    return {step: found[name] for step, found in looked if found}


START = [3.0, 3.1, 2.9, 3.05, 2.95]


def test_a_collapse_alarms_once_with_its_numbers() -> None:
    assert alarms(START + [3.0] * 10 + [1.0] * 10) == {18: "fell from 3 to 1.4"}
    assert alarms(START + [6.0] * 5) == {9: "rose from 3 to 6"}


def test_a_single_odd_step_is_no_alarm() -> None:
    assert not alarms(START + [3.0] * 5 + [0.1] + [3.0] * 5)


def test_what_varies_widely_from_the_start_must_change_more() -> None:
    wild = [1.0, 5.0, 3.0, 0.5, 5.5]
    assert not alarms(wild + [1.0] * 8)
    assert alarms(wild + [1.0] * 8, sigmas=0.5)
    assert not alarms(START + [2.0] * 8)
    assert alarms(START + [2.0] * 8, change=0.2)


def test_what_starts_at_zero_alarms_by_spread_alone() -> None:
    assert alarms([0.0, 0.01, 0.0, 0.01, 0.0] + [0.5] * 5)
    assert not alarms([0.0] * 20)


def test_steps_without_a_value_are_passed_over() -> None:
    assert alarms([*START, None, float("nan"), *[1.0] * 5]) == {11: "fell from 3 to 1"}


def test_a_held_out_reward_alarms_when_an_evaluation_falls() -> None:
    assert alarms([0.8, 0.7, 0.5, 0.3, 0.3], HELD_OUT) == {3: "fell from 0.8 to 0.3"}
    assert alarms([-1.0, -1.4, -2.0], HELD_OUT) == {2: "fell from -1 to -2"}
    assert not alarms([0.2, 0.9], HELD_OUT)
    assert not alarms([0.9, 0.1], "eval_other")


def test_a_guard_that_is_off_sees_nothing() -> None:
    assert not alarms(START + [0.0] * 9, action="off")


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.integers(0, 30))
def test_a_resumed_guard_knows_what_the_first_one_knew(values: list[float], stop: int) -> None:
    lines = [{"step": step, "image_x": value} for step, value in enumerate(values)]
    whole, resumed = DriftGuard(GuardSettings(), []), DriftGuard(GuardSettings(), [])
    expected = [whole.look(line) for line in lines]
    for line in lines[:stop]:
        resumed.look(line)
    assert [resumed.look(line) for line in lines[stop:]] == expected[stop:]


def test_metrics_are_means_over_the_groups_that_were_measured() -> None:
    found = image_metrics([{"a": 1.0, "b": 2.0}, {}, {"a": 3.0, "b": 4.0}])
    assert found == {"image_a": 2.0, "image_b": 3.0}
    assert image_metrics([{}, {}]) == {}


def test_rewards_without_a_weight_watch(configure: Any) -> None:
    listed = [{"name": "shapes"}, {"name": "jpeg", "weight": 0}]
    assert watching_rewards(configure(eval_rewards=listed)) == ["eval_jpeg"]
    assert watching_rewards(configure()) == []


@pytest.mark.parametrize(("action", "stops"), [("warn", False), ("pause", True)])
def test_a_pause_stops_the_run_with_a_checkpoint(configure: Any, action: str, stops: bool) -> None:
    settings = configure(
        steps=6, eval_every=50, checkpoint_every=50, groups_per_step=1,
        selection={"candidates": 4, "keep": 2}, guard={"action": action, "steps": 2, "change": 0.5},
    )  # fmt: skip
    stages = FakeStages(settings)
    stages.measured = lambda group: 1.0 if group < 3 else 0.01
    made = course(settings, stages)
    done = asyncio.run(train(made.run, 0))
    tracked = made.folder.history()
    told = {line["step"]: line["alarms"] for line in tracked if "alarms" in line}
    assert told == {5: {"image_edges": "fell from 1 to 0.01"}}
    assert [line["step"] for line in tracked] == list(range(6 if stops else 7))
    assert done == made.checkpoints.steps()[-1] == (5 if stops else 6)
