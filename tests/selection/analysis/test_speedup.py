"""Comparisons of learning curves: planted speed-ups are found, and their intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selection.analysis.speedup import (
    advantage,
    cost_to_reach,
    final_score,
    interval,
    paired_difference,
    speedup,
)
from selection.strategies import Floats

STEPS = np.arange(0, 101, 5, dtype=np.float64)


def curve(rate: float, noise: float = 0.0, seed: int = 0) -> tuple[Floats, Floats]:
    """A score that rises with 1 - exp(-rate x step / 100)."""
    rng = np.random.default_rng(seed)
    return STEPS, 1 - np.exp(-rate * STEPS / 100) + noise * rng.normal(size=len(STEPS))


def test_a_crossing_lies_between_two_evaluations() -> None:
    costs, scores = np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.4, 0.8])
    assert cost_to_reach(costs, scores, 0.5) == pytest.approx(12.5)
    assert cost_to_reach(costs, scores, 0.8) == 20.0
    assert cost_to_reach(costs, scores, -1.0) == 0.0
    assert cost_to_reach(costs, scores, 0.9) == np.inf


def test_a_lucky_evaluation_is_no_crossing() -> None:
    costs = np.arange(5.0)
    assert cost_to_reach(costs, np.array([0.0, 0.9, 0.1, 0.2, 0.6]), 0.6) == 4.0


@given(scores=st.lists(st.floats(-5, 5), min_size=2, max_size=20))
def test_a_baseline_always_reaches_its_own_final_score(scores: list[float]) -> None:
    values = np.array(scores)
    assert cost_to_reach(np.arange(float(len(values))), values, final_score(values)) < np.inf


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.2])
def test_a_planted_speedup_is_found(factor: float) -> None:
    found = speedup([curve(3.0)] * 3, [curve(3.0 * factor)] * 3)
    assert found.ratio.value == pytest.approx(factor, rel=0.03)
    assert (found.reached, found.seeds) == (3, 3)


def test_noise_in_the_scores_does_not_favour_the_noisier_arm() -> None:
    ratios = [
        speedup([curve(3.0, 0.01, seed)], [curve(3.0, 0.05, 1000 + seed)]).ratio.value for seed in range(200)
    ]
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1.0, abs=0.15)


def test_an_arm_that_never_gets_there_is_said_so() -> None:
    found = speedup([curve(3.0), curve(3.0)], [curve(1.0), curve(6.0)])
    assert (found.reached, found.seeds) == (1, 2)
    low = speedup([curve(3.0)], [curve(1.0)])
    assert low.reached == 0
    assert low.ratio.value < 1.0


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.2])
def test_two_arms_are_compared_at_a_third_ones_score(factor: float) -> None:
    """Whatever the target below both ends, the planted factor is found; it is one against itself."""
    found = advantage([0.6, 0.75], [curve(3.0 * factor)] * 2, [curve(3.0)] * 2)
    assert found.ratio.value == pytest.approx(factor, rel=0.05)
    assert (found.bound, found.sure) == ("", factor > 1)
    assert advantage([0.5], [curve(2.0)], [curve(2.0)]).ratio.value == 1.0


def test_an_arm_that_does_not_reach_the_score_counts_as_a_whole() -> None:
    found = advantage([0.9], [curve(5.0)], [curve(1.0)])
    assert found.ratio.value == pytest.approx(STEPS[-1] / cost_to_reach(*curve(5.0), 0.9))
    assert (found.arm_reached, found.other_reached, found.bound) == (1, 0, "≥")
    cheap = (STEPS / 10, curve(1.0)[1])
    cut = advantage([0.9, 0.9], [cheap, cheap], [curve(5.0), curve(5.0)])
    assert cut.ratio.low > 1
    assert (cut.bound, cut.sure) == ("≤", False)
    assert advantage([0.9], [curve(1.0)], [curve(1.0)]).bound == "≶"


def test_an_arm_that_is_there_at_once_has_a_finite_ratio() -> None:
    found = speedup([curve(3.0)], [(STEPS, np.ones(len(STEPS)))])
    assert found.ratio.value < len(STEPS)


def test_a_baseline_that_learns_nothing_is_no_target() -> None:
    with pytest.raises(ValueError, match="before training"):
        speedup([(STEPS, np.full(len(STEPS), 0.5))], [curve(3.0)])


def test_intervals_of_five_seeds_cover() -> None:
    rng = np.random.default_rng(0)
    found = [interval(rng.normal(size=5)) for _ in range(300)]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.91 <= covered <= 0.98


def test_intervals_of_many_seeds_are_students() -> None:
    values = np.random.default_rng(1).normal(size=40)
    found = interval(values)
    half = 2.02 * values.std(ddof=1) / np.sqrt(40)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)


def test_a_single_seed_has_no_interval() -> None:
    found = interval(np.array([2.0]))
    assert found.value == 2.0
    assert np.isnan(found.low)
    assert np.isnan(found.high)


def test_pairs_cancel_what_seeds_share() -> None:
    luck = np.random.default_rng(2).normal(size=5)
    found = paired_difference(list(luck), list(luck + 0.1))
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("costs", "scores", "message"),
    [
        ([0.0, 0.0], [0.1, 0.2], "rising costs"),
        ([0.0, 1.0], [0.1], "as many scores"),
        ([0.0, 1.0], [0.1, np.nan], "finite scores"),
    ],
)
def test_broken_curves_are_refused(costs: list[float], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost_to_reach(np.array(costs), np.array(scores), 0.5)
