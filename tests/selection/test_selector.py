"""Tests of the selector: its metrics of a batch, and independence of order and worker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import pytest

from rewards.combine import Scores
from selection.records import Selection
from selection.selector import Selector, tie_keys
from selection.settings import SelectionSettings
from selection.strategies import STRATEGIES


def scores_of(total: Sequence[float]) -> Scores:
    values = np.asarray(total, dtype=np.float64)
    return Scores(
        rewards={"shapes": values},
        weights={"shapes": 1.0},
        valid=np.isfinite(values),
        total=values,
        strict=None,
    )


def select(totals: Sequence[Sequence[float]], **settings: Any) -> Selection:
    chosen = SelectionSettings(**({"candidates": 16, "keep": 2} | settings))
    ids = range(10, 10 + len(totals))
    return Selector(chosen, 0).select(5, list(ids), [scores_of(total) for total in totals])


def test_a_batch_in_numbers() -> None:
    nan = float("nan")
    selection = select([[0, 1, 2, 5], [1, 1, 1, 1], [3, nan, nan, nan], [0, 1, nan, nan]], keep=4)
    assert [(kept.group_id, kept.candidate) for kept in selection.kept] == [
        (10, 0), (10, 1), (10, 2), (10, 3), (13, 0), (13, 1)
    ]  # fmt: skip
    assert [group.margin for group in selection.groups] == [5, 0, 0, 1]
    assert [group.dropped for group in selection.groups] == [False, False, True, False]
    metrics = dict(selection.metrics)
    assert metrics.pop("reward_mean") == pytest.approx(16 / 11)
    assert metrics.pop("reward_std") == pytest.approx((np.std([0, 1, 2, 5]) + 0.5) / 3)
    advantage = np.array([kept.advantage for kept in selection.kept])
    assert metrics.pop("advantage_rms") == pytest.approx(np.sqrt(np.mean(advantage**2)))
    assert metrics == {
        "margin_mean": 2.0,
        "zero_margin_groups": 1.0,
        "tied_low": 1.0,
        "tied_high": 1.0,
        "dropped_groups": 1.0,
        "short_groups": 1.0,
        "candidates": 16.0,
        "valid": 11.0,
        "selected": 6.0,
    }


def test_nothing_valid_is_an_empty_selection() -> None:
    selection = select([[float("nan")] * 4])
    assert selection.kept == ()
    assert math.isnan(selection.metrics["reward_mean"])
    assert selection.metrics["dropped_groups"] == 1
    assert selection.metrics["margin_mean"] == 0


def test_a_total_that_is_not_finite_is_not_valid() -> None:
    total = np.array([0.0, 1.0, np.inf, np.nan])
    scores = Scores(
        rewards={"one": total}, weights={"one": 1.0}, valid=np.ones(4, np.bool_), total=total, strict=None
    )
    selection = Selector(SelectionSettings(keep=2), 0).select(0, [3], [scores])
    assert [kept.candidate for kept in selection.kept] == [0, 1]
    assert selection.metrics["valid"] == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_neither_order_nor_company_of_groups_matters(strategy: Any) -> None:
    selector = Selector(SelectionSettings(keep=4, strategy=strategy, advantages="candidates"), 7)
    rng = np.random.default_rng(1)
    scores = {group: scores_of(rng.integers(0, 3, size=8)) for group in range(6)}
    forward = selector.select(0, list(scores), list(scores.values()))
    backward = selector.select(0, list(scores)[::-1], list(scores.values())[::-1])
    key = attrgetter("group_id", "candidate")
    assert sorted(forward.kept, key=key) == sorted(backward.kept, key=key)


def test_groups_of_different_sizes() -> None:
    small, large = [0.0, 1.0], list(range(12))
    assert [g.candidates for g in select([small, large]).groups] == [2, 12]
    assert [kept.candidate for kept in select([small, large]).kept] == [0, 1, 0, 11]


def two_rewards(wide: Sequence[float], narrow: Sequence[float]) -> Scores:
    rewards = {"wide": np.asarray(wide, np.float64), "narrow": np.asarray(narrow, np.float64)}
    total = rewards["wide"] - rewards["narrow"]
    weights = {"wide": 1.0, "narrow": -1.0}
    return Scores(rewards=rewards, weights=weights, valid=np.isfinite(total), total=total, strict=None)


@pytest.mark.parametrize(("margin", "kept"), [("total", {0, 1, 4, 5}), ("each", {0, 2, 3, 5})])
def test_margins_on_the_total_or_on_each_reward(margin: Any, kept: set[int]) -> None:
    scores = two_rewards([0, 10, 50, 51, 80, 100, np.nan], [0.5, 0.4, 0.9, 0.1, 0.3, 0.6, 0.0])
    settings = SelectionSettings(keep=4, margin=margin)
    selection = Selector(settings, 0).select(0, [3], [scores])
    assert {one.candidate for one in selection.kept} == kept
    advantages = [one.advantage for one in selection.kept]
    assert advantages == sorted(advantages)


def test_the_mean_reward_is_raw_even_where_the_total_is_not() -> None:
    raw = np.array([3.0, 5.0])
    scores = Scores(
        rewards={"a": raw}, weights={"a": 2.0}, valid=np.ones(2, np.bool_), total=np.array([-1.0, 1.0]),
        strict=None,
    )  # fmt: skip
    metrics = Selector(SelectionSettings(), 0).select(0, [3], [scores]).metrics
    assert (metrics["reward_mean"], metrics["margin_mean"]) == (8.0, 2.0)


def test_keys_belong_to_candidates() -> None:
    assert tie_keys(1, 2, 8).tolist() == tie_keys(1, 2, 16)[:8].tolist()
    assert not set(tie_keys(1, 2, 8).tolist()) & set(tie_keys(1, 3, 8).tolist())
    assert not set(tie_keys(1, 2, 8).tolist()) & set(tie_keys(2, 2, 8).tolist())
    assert tie_keys(0, 0, 2).dtype == np.uint64


def test_the_seed_decides_between_ties() -> None:
    scores = [scores_of([0, 0, 0, 0, 1, 1, 1, 1])]
    picks = {
        tuple(
            kept.candidate for kept in Selector(SelectionSettings(keep=2), seed).select(0, [4], scores).kept
        )
        for seed in range(20)
    }
    assert len(picks) > 5


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        ([], 0, "step 3: 0 groups with 0 scores"),
        ([1], 2, "1 groups with 2 scores"),
        ([1, 1], 2, "appears twice"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(ids: list[int], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selector(SelectionSettings(), 0).select(3, ids, [scores_of([0, 1])] * count)


def test_ties_are_told_by_the_raw_reward_they_are_at() -> None:
    """Of standardised rewards, which tie at zero, as well; groups of too few valid ones do not tie."""
    nan = float("nan")
    metrics = select([[0.5, 0.5, nan], [2, 2, 2], [1, 7, 7], [9, nan, nan]]).metrics
    assert (metrics["zero_margin_groups"], metrics["tied_low"], metrics["tied_high"]) == (2, 0.5, 2)
    standardised = replace(scores_of([3, 3, 3]), total=np.zeros(3))
    metrics = Selector(SelectionSettings(), 0).select(0, [1], [standardised]).metrics
    assert (metrics["tied_low"], metrics["tied_high"]) == (3, 3)
    assert "tied_low" not in select([[0, 1]]).metrics


def test_it_answers() -> None:
    assert Selector(SelectionSettings(), 0).ping() == "noise_margin"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_groups_that_tie_are_left_out_unless_they_are_to_be_kept(strategy: Any) -> None:
    """Their advantages are zero, so they would only divide the others' gradient by a larger number."""
    totals = [[0, 1, 0, 1], [1, 1, 1, 1], [0.2, 0.8, 0.4, 0.6]]
    dropped = select(totals, strategy=strategy, keep=4, candidates=4)
    assert {kept.group_id for kept in dropped.kept} == {10, 12}
    assert dropped.groups[1].selected == 0
    kept = select(totals, strategy=strategy, keep=4, candidates=4, ties="keep")
    if strategy in ("all", "random"):
        assert [one.advantage for one in kept.kept if one.group_id == 11] == [0.0] * 4
        assert kept.metrics["selected"] == dropped.metrics["selected"] + 4
    mine = {(one.group_id, one.candidate): one.advantage for one in dropped.kept}
    assert mine == {(one.group_id, one.candidate): one.advantage for one in kept.kept if one.group_id != 11}


def test_a_random_part_that_ties_is_left_out_unless_its_group_varies_and_is_its_measure() -> None:
    totals = [[1.0] * 12 + [0.0]] * 40
    parts = select(totals, strategy="random", candidates=13, advantages="selected")
    assert 0 < len(parts.kept) < 30  # few parts of two hold the one that differs
    assert all(one.advantage != 0 for one in parts.kept)
    whole = select(totals, strategy="random", candidates=13, advantages="candidates")
    assert len(whole.kept) == 80
    assert all(one.advantage != 0 for one in whole.kept)


def test_matched_advantages_refer_to_training_on_every_group_that_varies() -> None:
    varied, tied = [[0.0, 1.0, 0.5, 0.2]], [[1.0] * 4] * 3
    for ties in ("drop", "keep"):
        everything = select(varied + tied, strategy="all", ties=ties)
        matched = select(varied + tied, strategy="noise_margin", rms_match=True, ties=ties)
        assert matched.metrics["advantage_rms"] == pytest.approx(everything.metrics["advantage_rms"])
