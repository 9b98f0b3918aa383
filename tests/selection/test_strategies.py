"""The strategies: against brute force, by symmetry, and at the edges."""

from __future__ import annotations

from itertools import combinations
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from selection.selector import tie_keys
from selection.settings import StrategyName
from selection.strategies import STRATEGIES, Batch, margins, promising, ranking

PICKY = ("noise_margin", "max_variance", "global_margin", "prompt_filter")
GRID = st.integers(-8, 8)
"""Small integers: ties are common, and affine maps of them are exact."""


def batch_of(
    rewards: object, keep: int, *, valid: object = None, seed: int = 0, tolerance: float = 1e-6
) -> Batch:
    values = np.atleast_2d(np.asarray(rewards, dtype=np.float64))
    mask = np.isfinite(values) if valid is None else np.atleast_2d(np.asarray(valid, dtype=np.bool_))
    keys = np.random.default_rng(seed).permutation(values.size).reshape(values.shape).astype(np.uint64)
    return Batch(rewards=values, valid=mask, keys=keys, keep=keep, tolerance=tolerance)


def chosen(name: str, batch: Batch) -> list[list[int]]:
    return [row.tolist() for row in STRATEGIES[name](batch)]  # type: ignore[index]


@st.composite
def batches(draw: st.DrawFn, *, even: bool = True) -> Batch:
    groups, n = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    flat = groups * n
    rewards = np.array(draw(st.lists(GRID, min_size=flat, max_size=flat)), dtype=np.float64)
    valid = np.array(draw(st.lists(st.booleans(), min_size=flat, max_size=flat)))
    values = np.where(valid, rewards, np.nan).reshape(groups, n)
    keep = 2 * draw(st.integers(1, n // 2)) if even else draw(st.integers(2, n))
    return batch_of(values, keep, valid=valid.reshape(groups, n), seed=draw(st.integers(0, 2**16)))


def identities(batch: Batch, name: str) -> list[set[int]]:
    """The kept candidates by key, which belongs to the candidate wherever it stands."""
    return [set(keys[row].tolist()) for keys, row in zip(batch.keys, STRATEGIES[name](batch), strict=True)]  # type: ignore[index]


def shuffled(batch: Batch, order: NDArray[np.int64]) -> Batch:
    return Batch(
        rewards=batch.rewards[:, order],
        valid=batch.valid[:, order],
        keys=batch.keys[:, order],
        keep=batch.keep,
        tolerance=batch.tolerance,
    )


def test_the_table_has_every_name() -> None:
    assert set(STRATEGIES) == set(get_args(StrategyName))


@pytest.mark.parametrize("name", STRATEGIES)
@given(batch=batches())
def test_what_is_kept_is_valid_unique_ordered_and_within_budget(name: str, batch: Batch) -> None:
    rows = chosen(name, batch)
    for row, rewards, valid in zip(rows, batch.rewards, batch.valid, strict=True):
        assert len(set(row)) == len(row)
        assert valid[row].all()
        assert (np.diff(rewards[row]) >= 0).all()
        assert not row or valid.sum() >= 2
        if name not in ("all", "global_margin", "prompt_filter"):
            assert len(row) <= batch.keep
        if name in ("noise_margin", "global_margin"):
            assert len(row) % 2 == 0
    if name != "all":
        assert sum(map(len, rows)) <= len(rows) * batch.keep


@pytest.mark.parametrize("name", STRATEGIES)
@given(batch=batches(), seed=st.integers(0, 2**16))
def test_permuting_candidates_permutes_the_selection(name: str, batch: Batch, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(batch.rewards.shape[1])
    assert identities(shuffled(batch, order), name) == identities(batch, name)


@pytest.mark.parametrize("name", STRATEGIES)
@given(batch=batches(), seed=st.integers(0, 2**16))
def test_permuting_groups_permutes_the_selection(name: str, batch: Batch, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(batch.rewards))
    moved = Batch(
        rewards=batch.rewards[order],
        valid=batch.valid[order],
        keys=batch.keys[order],
        keep=batch.keep,
        tolerance=batch.tolerance,
    )
    before = identities(batch, name)
    assert identities(moved, name) == [before[group] for group in order]


@pytest.mark.parametrize("name", STRATEGIES)
@given(batch=batches(), scale=st.sampled_from([0.25, 1.0, 4.0, 3.0]), shift=st.integers(-100, 100))
def test_a_positive_affine_map_changes_nothing(name: str, batch: Batch, scale: float, shift: int) -> None:
    moved = Batch(
        rewards=scale * batch.rewards + shift,
        valid=batch.valid,
        keys=batch.keys,
        keep=batch.keep,
        tolerance=batch.tolerance,
    )
    assert chosen(name, moved) == chosen(name, batch)


@pytest.mark.parametrize("name", STRATEGIES)
def test_padding_changes_nothing(name: str) -> None:
    batch = batch_of([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], 2)
    padded = Batch(
        rewards=np.pad(batch.rewards, ((0, 0), (0, 3)), constant_values=np.nan),
        valid=np.pad(batch.valid, ((0, 0), (0, 3))),
        keys=np.pad(batch.keys, ((0, 0), (0, 3))),
        keep=batch.keep,
        tolerance=batch.tolerance,
    )
    assert chosen(name, padded) == chosen(name, batch)


@given(batch=batches(even=False))
def test_max_variance_equals_brute_force(batch: Batch) -> None:
    for row, rewards, order in zip(
        STRATEGIES["max_variance"](batch), batch.rewards, ranking(batch), strict=True
    ):
        if len(order) == 0 or np.ptp(rewards[order]) == 0:
            assert len(row) == 0
            continue
        size = min(batch.keep, len(order))
        best = max(np.var(rewards[list(subset)]) for subset in combinations(order, size))
        assert len(row) == size
        assert np.var(rewards[row]) == pytest.approx(best, abs=1e-12)


def test_max_variance_may_be_lopsided() -> None:
    assert chosen("max_variance", batch_of([0.0, 0.9, 0.95, 1.0, 1.0, 1.0], 4))[0][0] == 0
    assert len(set(chosen("max_variance", batch_of([0.0, 0.9, 0.95, 1.0, 1.0, 1.0], 4))[0]) & {3, 4, 5}) == 3


@given(values=st.lists(st.floats(-1e6, 1e6), max_size=12))
def test_margins_never_increase(values: list[float]) -> None:
    found = margins(np.sort(np.array(values, dtype=np.float64)))
    assert len(found) == len(values) // 2
    assert (np.diff(found) <= 0).all()
    assert (found >= 0).all()


def test_noise_margin_keeps_the_ends() -> None:
    assert chosen("noise_margin", batch_of([5, 1, 4, 2, 3, 0], 4)) == [[5, 1, 2, 0]]


def test_noise_margin_leaves_out_pairs_that_tie() -> None:
    rows = chosen("noise_margin", batch_of([1, 0, 0, 0, 0, 0], 4))
    assert len(rows[0]) == 2
    assert rows[0][1] == 0


@given(batch=batches())
def test_more_keep_contains_less(batch: Batch) -> None:
    fewer = Batch(
        rewards=batch.rewards, valid=batch.valid, keys=batch.keys, keep=2, tolerance=batch.tolerance
    )
    for name in ("noise_margin", "global_margin", "random"):
        for few, many in zip(identities(fewer, name), identities(batch, name), strict=True):
            assert few <= many


@pytest.mark.parametrize("name", ["random", "noise_margin", "max_variance", "global_margin", "prompt_filter"])
def test_without_oversampling_everything_is_kept(name: str) -> None:
    rewards = np.random.default_rng(3).normal(size=(5, 8))
    batch = batch_of(rewards, 8)
    assert chosen(name, batch) == chosen("all", batch)


@pytest.mark.parametrize("name", PICKY)
def test_a_group_of_equals_contributes_nothing(name: str) -> None:
    rows = chosen(name, batch_of([[0.5] * 6, [0, 1, 2, 3, 4, 5]], 4))
    assert rows[0] == []
    assert len(rows[1]) >= 4


@pytest.mark.parametrize("name", PICKY)
def test_a_batch_of_equals_gives_nothing(name: str) -> None:
    assert chosen(name, batch_of(np.ones((3, 4)), 2)) == [[], [], []]


@pytest.mark.parametrize("name", STRATEGIES)
def test_invalid_rewards_are_never_looked_at(name: str) -> None:
    valid = [[True, True, False, True, True, False]]
    for poison in (np.nan, np.inf, -1e9):
        rows = chosen(name, batch_of([0, 3, poison, 1, 2, poison], 4, valid=valid))
        assert rows == [[0, 3, 4, 1]]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_group_of_one_is_dropped(name: str) -> None:
    rows = chosen(name, batch_of([[1.0, np.nan, np.nan, np.nan], [np.nan] * 4, [1, 2, 3, 4]], 4))
    assert rows[0] == rows[1] == []
    assert rows[2] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["random", "max_variance"])
def test_a_small_group_is_kept_whole(name: str) -> None:
    assert chosen(name, batch_of([np.nan, 3, 1, 2, np.nan, np.nan], 4)) == [[2, 3, 1]]


@pytest.mark.parametrize("name", ["noise_margin", "global_margin"])
def test_an_odd_group_leaves_its_middle(name: str) -> None:
    assert chosen(name, batch_of([np.nan, 3, 1, 2, np.nan, np.nan], 4)) == [[2, 1]]


def test_ties_are_broken_by_key_alone() -> None:
    rewards = [0, 0, 0, 0, 1, 1, 1, 1]
    picks = {tuple(chosen("noise_margin", batch_of(rewards, 2, seed=seed))[0]) for seed in range(200)}
    assert picks == {(low, high) for low in range(4) for high in range(4, 8)}
    assert chosen("noise_margin", batch_of(rewards, 2)) == chosen("noise_margin", batch_of(rewards, 2))


def test_random_is_uniform() -> None:
    counts = np.zeros(6)
    for seed in range(600):
        counts[chosen("random", batch_of(range(6), 2, seed=seed))[0]] += 1
    assert np.abs(counts - 200).max() < 60


def test_global_margin_spends_where_margins_are_wide() -> None:
    rows = chosen("global_margin", batch_of([[0, 10, 1, 9], [4, 5, 4.5, 4.6]], 2))
    assert rows == [[0, 2, 3, 1], []]


def test_global_margin_spreads_equal_margins() -> None:
    rows = chosen("global_margin", batch_of([[0, 0, 1, 1]] * 4, 2))
    assert [len(row) for row in rows] == [2, 2, 2, 2]


@given(batch=batches())
def test_global_margin_spends_its_whole_budget_on_the_widest(batch: Batch) -> None:
    ranked = [rewards[order] for rewards, order in zip(batch.rewards, ranking(batch), strict=True)]
    wide = np.concatenate([row[row > batch.tolerance] for row in map(margins, ranked)])
    rows = STRATEGIES["global_margin"](batch)
    taken = np.concatenate([margins(rewards[row]) for rewards, row in zip(batch.rewards, rows, strict=True)])
    budget = len(rows) * batch.keep // 2
    assert np.sort(taken).tolist() == np.sort(wide)[::-1][:budget][::-1].tolist()


def test_an_outlier_captures_no_more_than_its_prefix() -> None:
    rows = chosen("global_margin", batch_of([[-14, 0.5, 0.5, 0.5, 0.5, 0.6], [0, 0.2, 0.4, 0.6, 0.8, 1]], 2))
    assert len(rows[0]) == 2
    assert rows[1] == [0, 5]


def test_prompt_filter_takes_whole_groups_of_the_widest_spread() -> None:
    rewards = [[0, 1, 0, 1], [0, 4, 0, 4], [0, 2, 0, 2], [0, 3, 0, 3]]
    assert [len(row) for row in chosen("prompt_filter", batch_of(rewards, 2))] == [0, 4, 0, 4]


def test_prompt_filter_fills_its_budget_with_a_part() -> None:
    rewards = [[0, 1, 0, 1, 0, 1], [0, 4, 0, 4, 0, 4], [0, 2, 0, 2, 0, 2]]
    assert [len(row) for row in chosen("prompt_filter", batch_of(rewards, 3))] == [0, 6, 3]
    assert [len(row) for row in chosen("prompt_filter", batch_of(rewards[:2], 4))] == [2, 6]


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, np.nan]), min_size=4, max_size=24),
    st.integers(2, 4),
    st.integers(0, 1000),
)
def test_the_promising_are_the_ends_of_the_previews(previews: list[float], count: int, seed: int) -> None:
    rewards = np.array(previews)
    valid = np.isfinite(rewards)
    chosen = promising(rewards, valid, tie_keys(seed, 0, len(rewards)), count)
    assert len(set(chosen.tolist())) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    if valid.sum() < count:
        assert set(np.flatnonzero(valid)) <= set(chosen.tolist())
        return
    ranked = np.sort(rewards[valid])
    ends = [*ranked[: count // 2], *ranked[len(ranked) - (count - count // 2) :]]
    assert sorted(rewards[chosen]) == sorted(ends)
