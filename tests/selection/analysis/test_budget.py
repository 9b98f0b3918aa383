"""Budgets: the arithmetic, exactly, and errors that show it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selection.analysis.budget import Budget, plan_budget


@given(groups=st.integers(1, 64), candidates=st.integers(2, 32), oversample=st.integers(1, 8))
def test_fixed_train_trains_as_the_baseline(groups: int, candidates: int, oversample: int) -> None:
    plan = plan_budget("fixed_train", groups=groups, candidates=candidates, oversample=oversample)
    assert plan.trained == groups * candidates
    assert plan.sampled == oversample * groups * candidates
    assert plan.groups == groups


@given(groups=st.integers(1, 64), candidates=st.integers(2, 32), oversample=st.integers(1, 8))
def test_fixed_rollout_samples_as_the_baseline(groups: int, candidates: int, oversample: int) -> None:
    plan = plan_budget(
        "fixed_rollout", groups=groups * oversample, candidates=candidates, oversample=oversample
    )
    assert plan.sampled == groups * oversample * candidates
    assert plan.trained * oversample == plan.sampled


def test_the_published_setting() -> None:
    plan = plan_budget("fixed_rollout", groups=48, candidates=24, oversample=2, keep=48)
    assert plan == Budget(groups=24, candidates=48, keep=48)
    assert plan.sampled == plan.trained == 1152


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("fixed_rollout", {"groups": 9}, "9 / 2 is not whole"),
        ("fixed_rollout", {"keep": 17}, "from 2 to 2 x 8 = 16 candidates, got 17"),
        ("fixed_train", {"keep": 4}, "keeps the baseline's 8 candidates per prompt, got 4"),
        ("fixed_train", {"oversample": 0}, "got 8, 8 and 0"),
    ],
)
def test_errors_say_the_arithmetic(mode: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_budget(mode, **({"groups": 8, "candidates": 8, "oversample": 2} | changes))  # type: ignore[arg-type]
