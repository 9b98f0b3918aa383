"""The division of trajectories among ranks: every one once, and equal work, for any order of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.rank_shares import Assignment, split_over_ranks
from learner.records import Unit
from selection.records import Kept

COUNTS = st.integers(1, 40)
RANKS = st.integers(1, 5)
UPDATES = st.integers(1, 4)


def kept_of(count: int) -> list[Kept]:
    return [Kept(group_id=i // 4, candidate=i % 4, advantage=i - count / 2) for i in range(count)]


def real(items: list[Assignment]) -> list[Assignment]:
    return [item for item in items if item.weight > 0]


@given(COUNTS, RANKS, UPDATES, st.integers(0, 99), st.integers(0, 99))
def test_every_trajectory_is_trained_once_with_equal_weight(
    count: int, ranks: int, updates: int, seed: int, step: int
) -> None:
    kept = kept_of(count)
    plan = split_over_ranks(kept, ranks=ranks, updates=updates, seed=seed, step=step)
    assert len(plan) == ranks
    items = [item for mine in plan for share in mine for item in real(share)]
    assert sorted(item.trajectory for item in items) == list(range(count))
    for item in items:
        assert item.group_id == kept[item.trajectory].group_id
        assert item.advantage == kept[item.trajectory].advantage
    for parts in zip(*plan, strict=True):
        assert len({len(part) for part in parts}) == 1
        weights = [item.weight for part in parts for item in real(part)]
        assert len(set(weights)) == 1
        assert sum(weights) == pytest.approx(1)


@given(COUNTS, RANKS, UPDATES)
def test_no_rank_runs_more_than_one_pass_too_many(count: int, ranks: int, updates: int) -> None:
    plan = split_over_ranks(kept_of(count), ranks=ranks, updates=updates, seed=0, step=0)
    assert len(plan[0]) == min(updates, count)
    for parts in zip(*plan, strict=True):
        padding = sum(len(part) - len(real(part)) for part in parts)
        assert padding < ranks
        assert all(item.advantage == 0 for part in parts for item in part if item.weight == 0)
    sizes = [sum(len(real(part)) for part in parts) for parts in zip(*plan, strict=True)]
    assert max(sizes) - min(sizes) <= 1


@given(COUNTS, RANKS, UPDATES, st.randoms())
def test_the_order_of_kept_does_not_matter(count: int, ranks: int, updates: int, random: object) -> None:
    kept = kept_of(count)
    order = list(range(count))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = [kept[i] for i in order]
    expected = split_over_ranks(kept, ranks=ranks, updates=updates, seed=1, step=2)
    found = split_over_ranks(moved, ranks=ranks, updates=updates, seed=1, step=2)
    named = [
        [[replace(item, trajectory=order[item.trajectory]) for item in share] for share in mine]
        for mine in found
    ]
    assert named == expected


@given(COUNTS, RANKS, UPDATES)
def test_the_number_of_ranks_does_not_change_an_update(count: int, ranks: int, updates: int) -> None:
    kept = kept_of(count)
    plan = split_over_ranks(kept, ranks=ranks, updates=updates, seed=3, step=0)
    (single,) = split_over_ranks(kept, ranks=1, updates=updates, seed=3, step=0)
    for parts, whole in zip(zip(*plan, strict=True), single, strict=True):
        assert {i.trajectory for part in parts for i in real(part)} == {i.trajectory for i in whole}


def test_steps_and_seeds_shuffle_anew() -> None:
    plans = [
        tuple(
            item.trajectory
            for item in split_over_ranks(kept_of(20), ranks=1, updates=1, seed=seed, step=step)[0][0]
        )
        for seed in range(3)
        for step in range(3)
    ]
    assert len(set(plans)) == len(plans)


def test_nothing_kept_is_no_update() -> None:
    assert split_over_ranks([], ranks=2, updates=2, seed=0, step=0) == [[], []]


@given(st.integers(1, 12), RANKS, UPDATES, st.integers(0, 99))
def test_what_belongs_together_stays_together(pairs: int, ranks: int, updates: int, seed: int) -> None:
    """Pairs land whole in one share, padded with whole pairs, and every trajectory weighs the same."""
    kept = kept_of(2 * pairs)
    units = [(place, place + pairs) for place in range(pairs)]
    plan = split_over_ranks(
        kept,
        ranks=ranks,
        updates=updates,
        seed=seed,
        step=0,
        units=[Unit([one], whole=True) for one in units],
    )
    together = [
        [(one.trajectory, two.trajectory) for one, two in zip(share[::2], share[1::2], strict=True)]
        for mine in plan
        for share in mine
    ]
    assert {unit for share in together for unit in share} == set(units)
    trained = [item.trajectory for mine in plan for share in mine for item in real(share)]
    assert sorted(trained) == list(range(2 * pairs))
    for parts in zip(*plan, strict=True):
        assert len({len(part) for part in parts}) == 1
        assert sum(item.weight for part in parts for item in part) == pytest.approx(1)


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=6),
    RANKS, UPDATES, st.integers(0, 99),
)  # fmt: skip
def test_a_unit_is_one_optimizer_step_over_all_ranks(
    sizes: list[list[int]], ranks: int, updates: int, seed: int
) -> None:
    """Its sets have a seed each, and no rank has more than one trajectory more than another."""
    sets = np.split(np.arange(sum(map(sum, sizes))), np.cumsum([n for one in sizes for n in one])[:-1])
    rest = iter([tuple(one.tolist()) for one in sets])
    units = [Unit([next(rest) for _ in one]) for one in sizes]
    plan = split_over_ranks(
        kept_of(sum(map(sum, sizes))), ranks=ranks, updates=updates, seed=seed, step=0, units=units
    )
    steps: dict[int, set[int]] = {}
    seeds: dict[tuple[int, ...], set[int]] = {}
    for number, parts in enumerate(zip(*plan, strict=True)):
        assert len({len(part) for part in parts}) == 1
        assert max(len(real(part)) for part in parts) - min(len(real(part)) for part in parts) <= 1
        assert sum(item.weight for part in parts for item in part) == pytest.approx(1)
        for item in [item for part in parts for item in real(part)]:
            place, unit = next(
                (place, unit) for place, unit in enumerate(units)
                if item.trajectory in [n for one in unit.sets for n in one]
            )  # fmt: skip
            steps.setdefault(place, set()).add(number)
            one = next(tuple(one) for one in unit.sets if item.trajectory in one)
            seeds.setdefault(one, set()).add(item.seed)
    assert all(len(found) == 1 for found in steps.values())
    assert all(len(found) == 1 for found in seeds.values())
    assert len({seed for found in seeds.values() for seed in found}) == len(sets)
    trained = [item.trajectory for mine in plan for share in mine for item in real(share)]
    assert sorted(trained) == list(range(sum(map(sum, sizes))))
