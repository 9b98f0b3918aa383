"""The plan of a step: the counts of its work."""

from __future__ import annotations

from typing import Any

from cluster.config.preflight import Inputs
from cluster.plan.step import plan
from tests.support.fake_stages import PROMPTS


def plan_of(settings: Any) -> dict[str, str]:
    table = plan(settings, Inputs(train=PROMPTS * 4, held_out=PROMPTS))
    names, values = (list(column.cells) for column in table.columns)
    return dict(zip(map(str, names), map(str, values), strict=True))


def test_the_plan_counts_what_a_step_does(configure: Any) -> None:
    settings = configure(
        groups_per_step=6, eval_samples=2, selection={"candidates": 10, "keep": 4},
        rollout={"steps": 7, "guidance": 4.5, "workers": 3}, learner={"ranks": 2, "updates": 2},
    )  # fmt: skip
    found = plan_of(settings)
    assert found["prompts"] == "6 of 20"
    assert found["candidates sampled"] == "60 (10 per prompt)"
    assert found["batches of them"] == "4 of at most 16, for 3 samplers"
    assert found["candidates trained, at most"] == "24 (4 per prompt)"
    assert found["transformer passes, sampling"] == str(60 * 7 * 2)
    assert found["transformer passes, training"] == str(24 * 6 * 2)
    assert found["optimizer steps"] == "2"
    assert found["held-out images"] == "10"
    assert found["processes"] == "1 ray, 3 rollout, 1 reward, 1 selector, 1 observer, 2 learner"


def test_the_plan_follows_guidance_and_window(configure: Any) -> None:
    found = plan_of(configure(rollout={"steps": 7, "guidance": 1.0, "window_size": 2}))
    assert found["transformer passes, sampling"] == str(8 * 16 * 7)
    assert found["transformer passes, training"] == str(8 * 8 * 2)
