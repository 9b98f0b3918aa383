from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.combine import combine
from rewards.scorer import Judgement


def judged(
    values: list[float], valid: list[bool] | None = None, strict: list[float] | None = None
) -> Judgement:
    return Judgement(
        values=np.array(values, dtype=np.float64),
        valid=np.array([True] * len(values) if valid is None else valid, dtype=np.bool_),
        details={} if strict is None else {"strict": np.array(strict)},
    )


def test_total_is_the_weighted_sum_of_raw_scores() -> None:
    scores = combine({"a": judged([1.0, 2.0]), "b": judged([10.0, 20.0])}, {"a": 1.0, "b": 0.5})
    assert scores.total.tolist() == [6.0, 12.0]
    assert scores.valid.all()
    assert scores.strict is None
    with pytest.raises(FrozenInstanceError):
        scores.total = scores.total  # type: ignore[misc]


def test_a_missing_reward_makes_a_candidate_invalid_and_not_zero() -> None:
    scores = combine({"a": judged([1.0, 2.0]), "b": judged([0.0, 5.0], [False, True])}, {"a": 1.0, "b": 1.0})
    assert scores.valid.tolist() == [False, True]
    assert np.isnan(scores.total[0])
    assert np.isnan(scores.rewards["b"][0])
    assert scores.rewards["a"][0] == 1.0
    assert scores.total[1] == 7.0


def test_a_missing_reward_has_no_strict_score() -> None:
    """Evaluation takes the mean of strict scores, so a missing one must not count as a failure."""
    scores = combine({"a": judged([np.nan, 2.0], [False, True], strict=[0.0, 1.0])}, {"a": 1.0})
    np.testing.assert_array_equal(scores.strict, [np.nan, 1.0])


def test_a_reward_of_weight_zero_is_recorded_only() -> None:
    judgements = {"a": judged([1.0, 2.0]), "watch": judged([np.nan, 5.0], [False, True])}
    scores = combine(judgements, {"a": 2.0, "watch": 0.0})
    assert scores.valid.all()
    assert scores.total.tolist() == [2.0, 4.0]
    assert scores.rewards["watch"][1] == 5.0


def test_the_harder_reward_is_not_drowned_when_standardised() -> None:
    judgements = {"wide": judged([0.0, 100.0, 0.0, 100.0]), "narrow": judged([0.1, 0.1, 0.2, 0.2])}
    raw = combine(judgements, {"wide": 1.0, "narrow": 1.0})
    equal = combine(judgements, {"wide": 1.0, "narrow": 1.0}, "standardised")
    np.testing.assert_allclose(equal.total, [-2.0, 0.0, 0.0, 2.0], atol=1e-9)
    assert equal.rewards["wide"].tolist() == [0.0, 100.0, 0.0, 100.0]
    assert (equal.raw == raw.total).all()
    lopsided = combine(judgements, {"wide": 1.0, "narrow": -0.5}, "standardised")
    np.testing.assert_allclose(lopsided.total, [-0.5, 1.5, -1.5, 0.5], atol=1e-9)


@pytest.mark.parametrize("valid", [[True, False, False], [False, False, False], [True, True, True]])
def test_a_reward_that_tells_nothing_apart_adds_nothing(valid: list[bool]) -> None:
    judgements = {"same": judged([0.3, 0.3, 0.3], valid), "varied": judged([1.0, 2.0, 3.0])}
    scores = combine(judgements, {"same": 9.0, "varied": 1.0}, "standardised")
    alone = combine({"varied": judged([1.0, 2.0, 3.0], valid)}, {"varied": 1.0}, "standardised")
    np.testing.assert_array_equal(scores.total, alone.total)
    assert scores.valid.tolist() == valid


def test_only_candidates_that_count_set_the_scale() -> None:
    judgements = {"a": judged([0.0, 2.0, 50.0]), "b": judged([1.0, 1.0, 1.0], [True, True, False])}
    scores = combine(judgements, {"a": 1.0, "b": 1.0}, "standardised")
    np.testing.assert_allclose(scores.total, [-1.0, 1.0, np.nan])


def test_strict_comes_from_the_first_reward_that_has_it() -> None:
    judgements = {
        "a": judged([1.0, 1.0]),
        "b": judged([1.0, 1.0], strict=[0.0, 1.0]),
        "c": judged([1.0, 1.0], strict=[1.0, 1.0]),
    }
    scores = combine(judgements, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert scores.strict is not None
    assert scores.strict.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("judgements", "weights", "message"),
    [
        ({"a": judged([1.0])}, {"b": 1.0}, r"rewards \['a'\] do not fit the weights of \['b'\]"),
        ({"a": judged([1.0])}, {"a": 0.0}, "at least one reward must have a non-zero weight"),
        ({"a": judged([1.0])}, {"a": float("nan")}, "weights must be finite"),
        ({}, {}, "at least one reward"),
        (
            {"a": judged([1.0]), "b": judged([1.0, 2.0])},
            {"a": 1.0, "b": 1.0},
            r"different numbers of candidates: {'a': 1, 'b': 2}",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    judgements: dict[str, Judgement], weights: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        combine(judgements, weights)


columns = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        *[st.lists(st.floats(-100, 100), min_size=n, max_size=n)] * 2,
        *[st.lists(st.booleans(), min_size=n, max_size=n)] * 2,
    )
)


@given(columns, st.floats(-3, 3), st.floats(0.1, 3))
def test_valid_and_total_agree(columns: tuple[list[float], ...], one: float, two: float) -> None:
    a, b, a_valid, b_valid = columns
    judgements = {"a": judged(a, [bool(v) for v in a_valid]), "b": judged(b, [bool(v) for v in b_valid])}
    scores = combine(judgements, {"a": one, "b": two})
    assert (np.isfinite(scores.total) == scores.valid).all()
    assert (scores.valid <= np.array(b_valid)).all()
    expected = one * np.array(a) + two * np.array(b)
    np.testing.assert_allclose(scores.total[scores.valid], expected[scores.valid])


@given(columns, st.floats(0.1, 3), st.floats(0.01, 100), st.floats(-100, 100))
def test_standardised_totals_ignore_scale_and_shift(
    columns: tuple[list[float], ...], weight: float, scale: float, shift: float
) -> None:
    a, b = (np.round(column, 2) for column in columns[:2])
    valid = [bool(v) for v in columns[2]]
    weights = {"a": 1.0, "b": weight}
    one = combine({"a": judged(a.tolist(), valid), "b": judged(b.tolist())}, weights, "standardised")
    moved = (scale * b + shift).tolist()
    two = combine({"a": judged(a.tolist(), valid), "b": judged(moved)}, weights, "standardised")
    np.testing.assert_allclose(one.total, two.total, atol=1e-5)
    assert (np.isfinite(one.total) == one.valid).all()
