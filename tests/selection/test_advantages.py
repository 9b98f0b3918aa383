"""Advantages: the three normalisations by hand, their sums, and the control for their size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selection.advantages import EPSILON, advantages, rms
from selection.settings import Normalisation

REWARDS = np.array([[0.0, 1.0, 2.0, 9.0], [5.0, 5.0, 6.0, 8.0]])
VALID = np.ones_like(REWARDS, dtype=np.bool_)
KEPT = (np.array([0, 3]), np.array([0, 3]))


def test_candidates_uses_the_whole_group() -> None:
    found = advantages(REWARDS, VALID, KEPT, normalisation="candidates")
    for row, values in zip(REWARDS, found, strict=True):
        assert values == pytest.approx((row[[0, 3]] - row.mean()) / (row.std() + EPSILON))


def test_selected_uses_the_kept_ones() -> None:
    found = advantages(REWARDS, VALID, KEPT, normalisation="selected")
    for row, values in zip(REWARDS, found, strict=True):
        half = (row[3] - row[0]) / 2
        assert values == pytest.approx(np.array([-half, half]) / (half + EPSILON))


def test_batch_keeps_the_size_of_margins() -> None:
    found = advantages(REWARDS, VALID, KEPT, normalisation="batch")
    scale = REWARDS.std() + EPSILON
    assert found[0] == pytest.approx(np.array([-4.5, 4.5]) / scale)
    assert found[1] == pytest.approx(np.array([-1.5, 1.5]) / scale)


def test_ranks_count_the_worse_and_the_better_of_the_whole_group() -> None:
    kept = (np.array([0, 2, 3]), np.array([0, 1, 3]))
    found = advantages(REWARDS, VALID, kept, normalisation="ranks")
    assert found[0].tolist() == pytest.approx([-1, 1 / 3, 1])
    assert found[1].tolist() == pytest.approx([-2 / 3, -2 / 3, 1])  # the first two tie


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=9))
def test_ranks_are_the_chance_to_win_against_another_candidate(rewards: list[float]) -> None:
    row = np.array([rewards])
    (found,) = advantages(
        row, np.ones_like(row, dtype=np.bool_), (np.arange(len(rewards)),), normalisation="ranks"
    )
    for place, value in enumerate(found):
        others = [other for j, other in enumerate(rewards) if j != place]
        wins = sum(1.0 if rewards[place] > o else 0.5 if rewards[place] == o else 0.0 for o in others)
        assert (value + 1) / 2 == pytest.approx(wins / len(others))
    assert found.sum() == pytest.approx(0, abs=1e-9)


def test_everything_kept_is_flowgrpo() -> None:
    everyone = (np.arange(4), np.arange(4))
    found = advantages(REWARDS, VALID, everyone, normalisation="batch")
    expected = (REWARDS - REWARDS.mean(axis=1, keepdims=True)) / (REWARDS.std() + 1e-4)
    assert np.stack(found) == pytest.approx(expected)


@pytest.mark.parametrize("normalisation", ["selected", "batch"])
@given(data=st.data())
def test_advantages_sum_to_zero(normalisation: Normalisation, data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 8))
    rewards = np.array([data.draw(st.lists(st.floats(-14, 1), min_size=size, max_size=size))])
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=2))))
    (found,) = advantages(
        rewards, np.ones_like(rewards, dtype=np.bool_), (kept,), normalisation=normalisation
    )
    assert abs(found.sum()) < 1e-6


@pytest.mark.parametrize("normalisation", ["candidates", "selected", "batch", "ranks"])
def test_invalid_and_dropped_candidates_do_not_count(normalisation: Normalisation) -> None:
    rewards = np.array([[0.0, 1.0, np.nan], [np.nan, 7.0, np.nan]])
    valid = np.isfinite(rewards)
    found = advantages(
        rewards, valid, (np.array([0, 1]), np.array([], dtype=np.int64)), normalisation=normalisation
    )
    assert found[0] == pytest.approx(np.array([-0.5, 0.5]) / (0.5 + EPSILON), abs=3e-4)
    assert len(found[1]) == 0


@pytest.mark.parametrize("normalisation", ["candidates", "selected", "batch"])
def test_rms_match_gives_the_size_of_training_on_everyone(normalisation: Normalisation) -> None:
    everyone = (np.arange(4), np.arange(4))
    reference = rms(advantages(REWARDS, VALID, everyone, normalisation="batch"))
    plain = advantages(REWARDS, VALID, KEPT, normalisation=normalisation)
    matched = advantages(REWARDS, VALID, KEPT, normalisation=normalisation, rms_match=True)
    assert rms(matched) == pytest.approx(reference)
    assert matched[0] / plain[0] == pytest.approx(np.full(2, rms(matched) / rms(plain)))


def test_rms_match_of_nothing_is_nothing() -> None:
    nobody = (np.array([], dtype=np.int64),) * 2
    assert rms(advantages(REWARDS, VALID, nobody, normalisation="batch", rms_match=True)) == 0.0


def test_equal_rewards_give_zeros() -> None:
    (found,) = advantages(
        np.ones((1, 3)), np.ones((1, 3), np.bool_), (np.arange(3),), normalisation="batch", rms_match=True
    )
    assert found.tolist() == [0.0, 0.0, 0.0]


def test_no_valid_candidate_at_all() -> None:
    (found,) = advantages(
        np.full((1, 3), np.nan),
        np.zeros((1, 3), np.bool_),
        (np.array([], dtype=np.int64),),
        normalisation="batch",
        rms_match=True,
    )
    assert len(found) == 0
