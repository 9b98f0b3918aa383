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


def test_a_reward_of_weight_zero_is_recorded_only() -> None:
    judgements = {"a": judged([1.0, 2.0]), "watch": judged([np.nan, 5.0], [False, True])}
    scores = combine(judgements, {"a": 2.0, "watch": 0.0})
    assert scores.valid.all()
    assert scores.total.tolist() == [2.0, 4.0]
    assert scores.rewards["watch"][1] == 5.0


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
