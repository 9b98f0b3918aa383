"""Strategies of a user's own: found by name, tried before a run, and checked whenever they choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from selection.strategies import STRATEGIES, Batch, check_strategy, load_strategy

OWN = """
import numpy as np
from selection.strategies import ranking

def last_two(batch):
    return [list(order[-2:]) for order in ranking(batch)]

def invalid(batch):
    return tuple(np.arange(2) for _ in batch.rewards)

def twice(batch):
    return tuple(np.array([1, 1]) for _ in batch.rewards)

def one_group(batch):
    return ranking(batch)[:1]

def outside(batch):
    return tuple(np.array([99]) for _ in batch.rewards)

def fails(batch):
    return batch.reward

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_strategies.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_strategy_of_ones_own_is_called_by_its_name() -> None:
    check_strategy("own_strategies:last_two", candidates=8, keep=4)
    rewards = np.array([[0.3, 0.1, 0.2], [np.nan, 0.5, np.nan]])
    keys = np.arange(6, dtype=np.uint64).reshape(2, 3)
    batch = Batch(rewards=rewards, valid=np.isfinite(rewards), keys=keys, keep=2, tolerance=0.0)
    kept = load_strategy("own_strategies:last_two")(batch)
    assert [(chosen.dtype, chosen.tolist()) for chosen in kept] == [(np.int64, [2, 0]), (np.int64, [])]


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_built_in_ones_are_what_they_were(name: str) -> None:
    check_strategy(name, candidates=8, keep=4)
    assert load_strategy(name) is STRATEGIES[name]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:one", r"got 'nowhere:one': cannot import 'nowhere'"),
        ("own_strategies:none", r"module 'own_strategies' has no 'none'"),
        ("own_strategies:NUMBER", r"expected a function of a Batch"),
        (
            "own_strategies:invalid",
            r"kept \[0, 1\], expected different ones of \[1, 2",
        ),
        ("own_strategies:twice", r"kept \[1, 1\], expected different ones"),
        ("own_strategies:outside", r"kept \[99\], expected different ones"),
        ("own_strategies:one_group", r"candidates of 1 groups, expected an entry for each of 3"),
        ("own_strategies:fails", r"failed on 3 groups: AttributeError: .*'reward'"),
    ],
)
def test_one_that_does_not_fit_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^selection\.strategy: .*" + message):
        check_strategy(name, candidates=8, keep=4)
