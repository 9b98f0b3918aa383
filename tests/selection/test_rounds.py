"""Rounds: narrow margins draw more, ties draw last, and the step's budget is kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.combine import Scores
from selection.rounds import allotted
from selection.settings import SelectionSettings


def scores(values: list[float]) -> Scores:
    total = np.array(values, dtype=np.float64)
    valid = np.isfinite(total)
    return Scores(rewards={"one": total}, weights={"one": 1.0}, valid=valid, total=total, strict=None)


def settings(adaptive: int = 4, candidates: int = 8, keep: int = 2) -> SelectionSettings:
    return SelectionSettings(adaptive=adaptive, candidates=candidates, keep=keep)


def given_to(groups: list[list[float]], **options: int) -> list[int]:
    ids = list(range(10, 10 + len(groups)))
    return allotted([scores(group) for group in groups], ids, settings(**options), seed=0)


def test_the_narrow_half_shares_what_is_left() -> None:
    assert given_to([[0, 0.1, 0.2], [0, 0.5, 1], [0, 0.3, 0.9], [0.4, 0.5, 0.7]]) == [8, 0, 0, 8]


def test_groups_that_tie_come_last() -> None:
    assert given_to([[1, 1, 1], [0, 0.5, 1], [0, 0, 0], [0, 0.1, 0.2]]) == [0, 8, 0, 8]


def test_missing_candidates_do_not_count() -> None:
    nan = float("nan")
    assert given_to([[0, nan, 0.9], [0.2, 0.3, nan], [nan, nan, 1.0], [0, 0, nan]]) == [8, 8, 0, 0]


def test_the_margin_is_that_of_the_kept_pairs() -> None:
    """The widest pair of the first is wider, its two widest are narrower."""
    groups = [[0, 0.5, 0.5, 1], [0, 0.1, 0.8, 0.9]]
    assert given_to(groups, keep=2) == [0, 8]
    assert given_to(groups, keep=4) == [8, 0]


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=9),
    st.integers(5, 20),
    st.randoms(),
)
def test_the_budget_is_kept_and_the_order_does_not_matter(
    groups: list[list[float]], candidates: int, random: object
) -> None:
    options = settings(candidates=candidates)
    ids = list(range(len(groups)))
    found = allotted([scores(group) for group in groups], ids, options, seed=3)
    assert sum(found) == len(groups) * (candidates - 4)
    assert min(found) >= 0
    random.shuffle(ids)  # type: ignore[attr-defined]
    moved = allotted([scores(groups[i]) for i in ids], ids, options, seed=3)
    assert dict(zip(ids, moved, strict=True)) == dict(enumerate(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adaptive": 1}, r"selection.adaptive must be from 2 to less than selection.candidates \(16\)"),
        ({"adaptive": 16}, "or 0 to turn it off, got 16"),
        ({"adaptive": 4, "drafts": 32}, r"selection.adaptive \(4\) and selection.drafts \(32\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionSettings(**changes)
