"""Margins on every reward in turn: against brute force, by symmetry, and at the edges."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from selection.strategies import STRATEGIES, Batch, each_margin

Parts = NDArray[np.float64]
TOLERANCE = 1e-6


@st.composite
def cases(draw: st.DrawFn, rewards: int | None = None) -> tuple[Batch, Parts]:
    """One to three groups of up to nine candidates under one to three rewards, with many ties."""
    count = rewards or draw(st.integers(1, 3))
    groups, n = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    size = count * groups * n
    flat = draw(st.lists(st.integers(-4, 4), min_size=size, max_size=size))
    valid = np.array(draw(st.lists(st.booleans(), min_size=groups * n, max_size=groups * n)))
    valid = valid.reshape(groups, n)
    parts = np.where(valid, np.array(flat, dtype=np.float64).reshape(count, groups, n), np.nan)
    keys = np.random.default_rng(draw(st.integers(0, 99))).permutation(groups * n).astype(np.uint64)
    keep = 2 * draw(st.integers(1, max(1, n // 2)))
    batch = Batch(
        rewards=parts.sum(axis=0), valid=valid, keys=keys.reshape(groups, n), keep=keep, tolerance=TOLERANCE
    )
    return batch, parts


def by_hand(batch: Batch, parts: Parts, group: int) -> set[int]:
    """The same by trying every pair: the widest of a reward, ties by key, until all of them pass."""
    left = set(np.flatnonzero(batch.valid[group]).tolist())
    kept: set[int] = set()
    passed = turn = 0
    while len(kept) < batch.keep and passed < len(parts):
        part, keys = parts[turn % len(parts), group], batch.keys[group]
        ranked = sorted(left, key=lambda i: (part[i], keys[i]))
        wide = len(ranked) > 1 and part[ranked[-1]] - part[ranked[0]] > TOLERANCE
        pair = {ranked[0], ranked[-1]} if wide else set()
        kept, left, passed, turn = kept | pair, left - pair, 0 if wide else passed + 1, turn + 1
    return kept


@given(cases())
def test_every_reward_in_turn_takes_its_widest_pair(case: tuple[Batch, Parts]) -> None:
    batch, parts = case
    for group, kept in enumerate(each_margin(batch, parts)):
        assert set(kept.tolist()) == by_hand(batch, parts, group)


@given(cases())
def test_kept_candidates_are_valid_unique_in_budget_and_ordered(case: tuple[Batch, Parts]) -> None:
    batch, parts = case
    for group, kept in enumerate(each_margin(batch, parts)):
        assert len(set(kept.tolist())) == len(kept) <= batch.keep
        assert len(kept) % 2 == 0
        assert batch.valid[group, kept].all()
        assert (np.diff(batch.rewards[group, kept]) >= 0).all()


@given(cases(rewards=1))
def test_one_reward_alone_is_the_noise_margin(case: tuple[Batch, Parts]) -> None:
    batch, parts = case
    plain = STRATEGIES["noise_margin"](batch)
    assert [row.tolist() for row in each_margin(batch, parts)] == [row.tolist() for row in plain]


@given(cases(), st.integers(0, 99))
def test_permuting_candidates_permutes_what_is_kept(case: tuple[Batch, Parts], seed: int) -> None:
    batch, parts = case
    order = np.random.default_rng(seed).permutation(batch.rewards.shape[1])
    moved = Batch(
        rewards=batch.rewards[:, order], valid=batch.valid[:, order], keys=batch.keys[:, order],
        keep=batch.keep, tolerance=TOLERANCE,
    )  # fmt: skip
    before = each_margin(batch, parts)
    after = each_margin(moved, parts[:, :, order])
    assert [set(order[row].tolist()) for row in after] == [set(row.tolist()) for row in before]


@given(cases(), st.integers(0, 2), st.sampled_from([0.5, 2.0, 8.0]), st.integers(-50, 50))
def test_the_scale_of_a_reward_decides_nothing(
    case: tuple[Batch, Parts], which: int, scale: float, shift: int
) -> None:
    batch, parts = case
    moved = parts.copy()
    moved[which % len(parts)] = scale * moved[which % len(parts)] + shift
    assert [set(row.tolist()) for row in each_margin(batch, moved)] == [
        set(row.tolist()) for row in each_margin(batch, parts)
    ]
