"""Tests of screening by previews: perfect, useless and noisy ones are distinguished."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from selection.analysis.screening import _contrast, agreement

FINALS = np.random.default_rng(0).normal(size=(60, 16))


def test_a_perfect_preview_captures_everything() -> None:
    found = agreement(3 * FINALS + 1, FINALS)
    assert found.correlation.value == pytest.approx(1.0)
    assert found.captured.value == pytest.approx(1.0)
    assert found.prompts == 60


def test_a_useless_preview_captures_nothing() -> None:
    found = agreement(np.random.default_rng(1).normal(size=FINALS.shape), FINALS)
    assert found.correlation.low < 0 < found.correlation.high
    assert found.captured.low < 0 < found.captured.high


def test_a_preview_that_always_says_the_same_tells_nothing() -> None:
    found = agreement(np.zeros_like(FINALS), FINALS)
    assert found.correlation.value == found.captured.value == 0.0


def test_a_noisy_preview_captures_its_correlation() -> None:
    noisy = 0.8 * FINALS + 0.6 * np.random.default_rng(2).normal(size=FINALS.shape)
    found = agreement(noisy, FINALS)
    by_hand = np.mean([stats.spearmanr(a, b).statistic for a, b in zip(noisy, FINALS, strict=True)])
    assert found.correlation.value == pytest.approx(by_hand)
    assert found.captured.value == pytest.approx(0.8, abs=0.05)
    assert found.captured.low < found.captured.value < found.captured.high


@pytest.mark.parametrize(
    "finals", [[0.5, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0], [0.0, 0.0, 1.0], [3.0, 2.0, 2.0]]
)
def test_ties_share_their_places_wherever_rewards_begin(finals: list[float]) -> None:
    """Against the mean over every order that ties could come in; perfect previews capture all of it."""
    row = np.array(finals)
    count, half = len(row), len(row) // 2
    orders = [order for order in permutations(range(count)) if (np.diff(row[list(order)]) >= 0).all()]
    ranked = [row[list(order)] for order in orders]
    by_hand = np.mean([one[count - half :].mean() - one[:half].mean() for one in ranked])
    assert _contrast(row[None], row[None]) == pytest.approx(by_hand)
    noisy = np.roll(row, 1)
    orders = [order for order in permutations(range(count)) if (np.diff(noisy[list(order)]) >= 0).all()]
    chosen = [row[list(order)] for order in orders]
    by_hand = np.mean([one[count - half :].mean() - one[:half].mean() for one in chosen])
    assert _contrast(noisy[None], row[None]) == pytest.approx(by_hand)
    assert agreement(row[None], row[None]).captured.value == pytest.approx(1.0)


def test_prompts_that_tie_are_left_out() -> None:
    finals = FINALS.copy()
    finals[:20] = 0.5
    assert agreement(FINALS, finals).prompts == 40
    with pytest.raises(ValueError, match="nothing to predict"):
        agreement(FINALS, np.zeros_like(FINALS))
