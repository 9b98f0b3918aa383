"""The division of an update's trajectories among ranks: equal work per rank, equal weight per trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice

from rollout.noise import derive_seed
from rollout.records import CandidateGroup, Handle
from selection.records import Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One trajectory of a rank's share: its place in the selection, its group, advantage and weight.

    ``seed`` is of random draws in this step, which what belongs together shares. Padding repeats a trajectory
    with weight zero, so that every rank runs the same number of passes.
    """

    trajectory: int
    group_id: int
    seed: int
    advantage: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankUpdate:
    """One rank's work in a step: a share per optimizer step, and handles of the data that shares refer to.

    ``conditionings`` are by group and ``trajectories`` by their place in the selection, both ascending.
    """

    shares: Sequence[Sequence[Assignment]]
    conditionings: Mapping[int, Handle]
    trajectories: Mapping[int, Handle]


def rank_updates(
    kept: Sequence[Kept],
    groups: Sequence[CandidateGroup],
    *,
    ranks: int,
    updates: int,
    seed: int,
    step: int,
    units: Sequence[Sequence[int]] | None = None,
) -> list[RankUpdate]:
    """Split a step's kept candidates by `split_over_ranks`, and add the handles that each rank needs."""
    by_id = {group.group_id: group for group in groups}
    found = []
    for mine in split_over_ranks(kept, ranks=ranks, updates=updates, seed=seed, step=step, units=units):
        owners = sorted({one.group_id for share in mine for one in share})
        numbers = sorted({one.trajectory for share in mine for one in share})
        handles = {n: by_id[kept[n].group_id].trajectories[kept[n].candidate] for n in numbers}
        conditionings = {owner: by_id[owner].conditioning for owner in owners}
        found.append(RankUpdate(shares=mine, conditionings=conditionings, trajectories=handles))
    return found


def split_over_ranks(
    kept: Sequence[Kept],
    *,
    ranks: int,
    updates: int,
    seed: int,
    step: int,
    units: Sequence[Sequence[int]] | None = None,
) -> list[list[list[Assignment]]]:
    """Split kept trajectories by update and rank: result[rank][update] is that rank's share of the update.

    Every trajectory of a unit is trained exactly once and weighs 1 / (size of its update), on any rank.
    ``units`` lists the places in ``kept`` that stay together; by default each is a unit of its own. The
    shuffle is seeded by the first place of a unit, so it does not depend on the units' order.
    """
    order = sorted(
        [(place,) for place in range(len(kept))] if units is None else units,
        key=lambda unit: derive_seed("shuffle", seed, step, kept[unit[0]].group_id, kept[unit[0]].candidate),
    )
    whole = [_assignments(order[u::updates], kept, seed, step) for u in range(updates)]
    return [[_share(units, rank, ranks) for units in whole if units] for rank in range(ranks)]


def _assignments(
    units: Sequence[Sequence[int]], kept: Sequence[Kept], seed: int, step: int
) -> list[list[Assignment]]:
    weight = 1 / max(1, sum(map(len, units)))
    return [
        [
            Assignment(
                trajectory=place,
                group_id=kept[place].group_id,
                seed=derive_seed("draws", seed, step, kept[unit[0]].group_id, kept[unit[0]].candidate),
                advantage=kept[place].advantage,
                weight=weight,
            )
            for place in unit
        ]
        for unit in units
    ]


def _share(units: Sequence[Sequence[Assignment]], rank: int, ranks: int) -> list[Assignment]:
    """Take a rank's units, and pad them to as many assignments as the longest share of a rank has."""
    shares = [list(chain(*units[other::ranks])) for other in range(ranks)]
    missing = max(map(len, shares)) - len(shares[rank])
    padding = [replace(one, advantage=0.0, weight=0.0) for one in units[0]]
    return [*shares[rank], *islice(cycle(padding), missing)]
