"""Exported metrics: valid and distinct names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.util.metrics import _is_invalid_metric_name  # what Ray discards in silence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.config.errors import UserError
from cluster.config.metric_names import check_rewards, exported
from cluster.config.settings import RunSettings
from cluster.config.sources import resolve
from cluster.trackers.tensorboard import TensorBoard


@pytest.mark.parametrize(
    ("metric", "name", "step"),
    [
        ("reward_mean", "reward_mean", ""),
        ("kl.t13", "kl", "13"),
        ("eval_my.tools:Reward", "eval_my_tools_reward", ""),
        ("eval_style.t3", "eval_style_t3", ""),
        ("eval_größe 2", "eval_gr__e_2", ""),
    ],
)
def test_every_name_becomes_valid(metric: str, name: str, step: str) -> None:
    assert exported(metric) == (name, step)


@given(st.text(max_size=20))
def test_no_name_of_a_reward_is_one_that_ray_discards(name: str) -> None:
    valid, _ = exported(f"eval_{name}")
    assert not _is_invalid_metric_name(f"noisemargin_{valid}")
    assert re.fullmatch(r"eval_[a-z0-9_]*", valid)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["my.tools:Reward", "my_tools:Reward"],
            "reward 'my_tools:Reward' and reward 'my.tools:Reward' would",
        ),
        (["style-2", "style 2"], "both be exported as eval_style_2"),
        (["Style", "style"], "both be exported as eval_style"),
        (["strict"], "reward 'strict' and the evaluation's own metric strict"),
        (["shapes", "win-rate"], "reward 'win-rate' and the evaluation's own metric win_rate"),
    ],
)
def test_two_figures_under_one_name_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rewards(names)


def test_a_configuration_with_such_rewards_is_refused() -> None:
    both = [{"name": name, "scorer": "jpeg"} for name in ("a:b", "a_b")]
    with pytest.raises(UserError, match="reward 'a:b' and reward 'a_b' would both be exported as eval_a_b"):
        resolve("shapes", {"rewards": both[:1], "eval_rewards": both[1:]})
    settings: RunSettings = resolve("shapes", {"rewards": both[:1], "eval_rewards": both[:1]})
    assert list(settings.distinct_rewards) == ["a:b"]


def test_tensorboard_has_the_same_names(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    line: dict[str, Any] = {
        "step": 1, "eval_my.tools:Reward": 0.5, "kl.t3": 0.25, "loss": 1.0, "reward_mean": 2.0,
    }  # fmt: skip
    board.log(line)
    board.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert set(found.Tags()["scalars"]) == {
        "eval/my_tools_reward", "training/kl.t3", "training/loss", "reward/mean",
    }  # fmt: skip
