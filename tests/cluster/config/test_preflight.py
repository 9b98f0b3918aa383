"""The check before a run: processes and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config.errors import UserError
from cluster.config.preflight import check, memory_gb, processes


def test_a_reward_of_training_and_evaluation_has_one_pool(configure: Any) -> None:
    listed = [{"name": "shapes", "workers": 2}]
    assert processes(configure(rewards=listed, eval_rewards=listed))["reward"] == 2
    assert processes(configure(rewards=listed, eval_rewards=[{"name": "jpeg"}]))["reward"] == 3


def test_memory_grows_with_processes_and_weights(configure: Any, model_folder: Path) -> None:
    small = memory_gb(configure())
    assert memory_gb(configure(rollout={"workers": 4})) > small
    assert memory_gb(configure(learner={"ranks": 2})) > small
    assert memory_gb(configure(cluster={"object_store_gb": 3.0})) == pytest.approx(small + 2)
    with (model_folder / "transformer" / "w.safetensors").open("wb") as file:
        file.truncate(10**9)
    assert memory_gb(configure()) == pytest.approx(small + 2 + 4)


def test_memory_of_another_machine_is_not_ours_to_judge(configure: Any, set_free_memory: Any) -> None:
    set_free_memory(0.1)
    assert check(configure(cluster={"address": "ray://somewhere:10001"})).train
    set_free_memory(64)
    assert check(configure()).held_out


def test_a_reward_that_compares_a_whole_group_is_not_given_it_in_two_rounds(
    configure: Any, set_free_memory: Any
) -> None:
    set_free_memory(64)
    rewards = [{"name": "whole", "scorer": "tests.support.scorers:WholeGroupScorer"}]
    rounds = {"selection": {"adaptive": 12}}
    with pytest.raises(UserError, match=r"selection.adaptive: got 12, but reward whole compares all"):
        check(configure(rewards=rewards, **rounds))
    assert check(configure(rewards=rewards)).train
    assert check(configure(**rounds)).train
    assert check(configure(rewards=[{"name": "shapes"}], eval_rewards=rewards, **rounds)).train
