"""One and two ranks under every stage of ZeRO: equal training, and checkpoints for each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from learner.digests import digests
from learner.records import BEHAVIOUR
from tests.support.ranks import SAVED, Case, Life, Task, in_world, resumed
from tests.support.tiny_learner import KEPT, rollout_settings, sample

TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2}

QUICK = [Case(1), Case(3, lora=4, beta=10), Case(3, objective="nft")]
EVERY = [
    Case(stage, dtype, lora) for dtype in ("float32", "bfloat16") for lora in (0, 4) for stage in range(4)
]
ROUNDED = [Case(1, "float16", 4), Case(3, "float16", 4), Case(2, "float16")]
OFFLOADED = [
    Case(1, offload="optimizer"),
    Case(2, "bfloat16", offload="optimizer"),
    Case(3, offload="parameters"),
]
FORWARD = [
    *(Case(stage, lora=lora, objective="nft") for stage in range(4) for lora in (0, 4)),
    *(Case(stage, "bfloat16", 4, objective="nft") for stage in (1, 3)),
    *(Case(stage, objective="awm", beta=0.1) for stage in (0, 2, 3)),
    *(Case(stage, lora=4, objective="dpo") for stage in (1, 3)),
    Case(2, objective="dpo"),
    Case(1, "float16", 4, objective="awm"),
]
SLOW = [*EVERY, *ROUNDED, *OFFLOADED, Case(1, beta=10), Case(3, beta=10), *FORWARD]


@dataclass(frozen=True)
class Lives:
    """One case: alone, by two ranks, and each resumed from its own and from the other's checkpoint."""

    case: Case
    alone: Life
    pair: list[Life]
    again: Life
    pair_again: list[Life]
    alone_from_pair: Life
    pair_from_alone: list[Life]
    pair_save: Path


def lives(cases: list[Case], pipeline: Path, home: Path, updates: int) -> dict[str, Lives]:
    batches = {
        (c.dtype, c.lora): sample(c.model(pipeline), rollout_settings(), keeps=(*KEPT, "clean"))
        for c in cases
    }
    plain = [Task(c, pipeline, batches[c.dtype, c.lora], updates) for c in cases]

    def saves(world: int) -> list[Path]:
        return [home / f"{c}-{world}" for c in cases]

    def from_scratch(world: int) -> list[Task]:
        return [replace(task, save=save) for task, save in zip(plain, saves(world), strict=True)]

    def from_save(world: int) -> list[Task]:
        return [resumed(t, s) for t, s in zip(plain, saves(world), strict=True)]

    one, two = in_world(1, from_scratch(1)), in_world(2, from_scratch(2))
    one_again = in_world(1, from_save(1) + from_save(2))
    two_again = in_world(2, from_save(2) + from_save(1))
    return {
        str(c): Lives(
            c, one[i][0], two[i], one_again[i][0], two_again[i],
            one_again[i + len(cases)][0], two_again[i + len(cases)], saves(2)[i],
        )
        for i, c in enumerate(cases)
    }  # fmt: skip


@pytest.fixture(scope="module")
def quick(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lives]:
    return lives(QUICK, pipeline_folder, tmp_path_factory.mktemp("quick"), updates=SAVED + 1)


@pytest.fixture(scope="module")
def slow(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lives]:
    return lives(
        SLOW, pipeline_folder, tmp_path_factory.mktemp("slow"), updates=10
    )  # two optimizer steps each


@pytest.fixture(
    params=[
        *(("quick", c) for c in QUICK),
        *(pytest.param(("slow", c), marks=pytest.mark.slow) for c in SLOW),
    ],
    ids=lambda given: f"{given[0]}-{given[1]}",
)
def found(request: pytest.FixtureRequest) -> Lives:
    which, case = request.param
    chosen: Lives = request.getfixturevalue(which)[str(case)]
    return chosen


def close(found: list[float], expected: list[float], case: Case) -> bool:
    return found == pytest.approx(expected, rel=TOLERANCE[case.dtype], abs=1e-8)


def test_two_ranks_train_as_one(found: Lives) -> None:
    assert len(set(found.alone.losses)) == len(found.alone.losses)
    assert close(found.pair[0].losses, found.alone.losses, found.case)
    if found.case.dtype == "float32":
        assert np.abs(found.pair[0].weights - found.alone.weights).max() < 2e-5
        assert np.abs(found.pair[0].average - found.alone.average).max() < 2e-5


def test_every_rank_lists_what_it_has_written_and_nothing_else(found: Lives) -> None:
    lists = [life.written.files for life in found.pair if life.written]
    assert len(lists) == 2
    assert lists[0]
    assert not lists[0].keys() & lists[1].keys()
    assert {**lists[0], **lists[1]} == digests(found.pair_save)


def test_a_kl_that_counts_is_the_same_on_all_ranks(found: Lives) -> None:
    kls = [one["kl"] for one in found.alone.metrics]
    if not found.case.beta and found.case.objective != "dpo":
        assert set(kls) == {0.0}
        return
    assert kls[-1] > kls[0] >= 0
    assert [one["kl"] for one in found.pair[0].metrics] == pytest.approx(kls, rel=1e-4, abs=1e-12)


def test_the_start_is_on_policy(found: Lives) -> None:
    if found.case.objective != "flow_grpo":
        pytest.skip("the sampler's steps have no part in it")
    for life in (found.alone, found.pair[0]):
        assert life.metrics[0]["ratio_max_deviation"] < (1e-5 if found.case.dtype == "float32" else 5e-3)
        assert life.metrics[0]["log_ratio_rms"] < life.metrics[1]["log_ratio_rms"]


def test_all_ranks_report_the_same_and_one_publishes(found: Lives) -> None:
    first, second = found.pair
    assert first.metrics == second.metrics
    assert second.weights.size == second.average.size == 0
    assert first.weights.size == first.average.size > 0
    assert not np.array_equal(first.weights, first.average)


def test_a_behaviour_policy_that_lags_is_in_the_checkpoint(found: Lives) -> None:
    lags = found.case.objective in ("nft", "awm")
    assert (BEHAVIOUR in {file for life in found.pair if life.written for file in life.written.files}) == lags


def test_resuming_is_exact(found: Lives) -> None:
    for whole, again in ((found.alone, found.again), (found.pair[0], found.pair_again[0])):
        assert again.metrics == whole.metrics[SAVED:]
        assert np.array_equal(again.weights, whole.weights)
        assert np.array_equal(again.average, whole.average)


def test_the_number_of_ranks_may_change_in_between(found: Lives) -> None:
    for again in (found.alone_from_pair, found.pair_from_alone[0]):
        assert close(again.losses, found.alone.losses[SAVED:], found.case)
        if found.case.dtype == "float32":
            assert np.abs(again.weights - found.alone.weights).max() < 2e-5
            assert np.abs(again.average - found.alone.average).max() < 2e-5


def test_weights_that_are_no_longer_finite_are_named_by_the_ranks_that_hold_them(found: Lives) -> None:
    for life in (found.alone, *found.pair):
        before, after = life.broken["named"]
        assert before == ()
        assert after


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(found: Lives) -> None:
    for life in (found.alone, *found.pair):
        assert life.broken["unchanged"]
        assert life.broken["went on"]
        assert life.broken["metrics"]["skipped_updates"] == life.broken["metrics"]["skipped_in_a_row"] == 2
        assert life.broken["after"]["skipped_updates"] == life.broken["after"]["skipped_in_a_row"] == 0
