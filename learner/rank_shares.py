"""Which rank trains which trajectory in which update: equal work on every rank, equal weight for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from rollout.noise import derive_seed
from rollout.records import CandidateGroup, Handle
from selection.records import Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One trajectory of a rank's share: its place in the driver's lists, its advantage and its weight.

    Padding repeats a trajectory with weight zero, so that every rank runs the same number of passes.
    """

    trajectory: int
    group_id: int
    advantage: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankUpdate:
    """One rank's part of a step: its items by optimizer step, and handles of all that these refer to.

    ``conditionings`` are by group and ``trajectories`` by their place in the selection, both ascending.
    """

    shares: Sequence[Sequence[Item]]
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
    """Split a step's kept candidates over ranks by `shares`, each with handles of what it trains on."""
    by_id = {group.group_id: group for group in groups}
    found = []
    for mine in shares(kept, ranks=ranks, updates=updates, seed=seed, step=step, units=units):
        owners = sorted({item.group_id for share in mine for item in share})
        numbers = sorted({item.trajectory for share in mine for item in share})
        handles = {n: by_id[kept[n].group_id].trajectories[kept[n].candidate] for n in numbers}
        conditionings = {owner: by_id[owner].conditioning for owner in owners}
        found.append(RankUpdate(shares=mine, conditionings=conditionings, trajectories=handles))
    return found


def shares(
    kept: Sequence[Kept],
    *,
    ranks: int,
    updates: int,
    seed: int,
    step: int,
    units: Sequence[Sequence[int]] | None = None,
) -> list[list[list[Item]]]:
    """Split kept trajectories by update and rank: result[rank][update] lists that rank's items.

    Every trajectory is trained exactly once and weighs 1 / (size of its update), whatever the rank it
    lands on. ``units`` lists the places in ``kept`` that stay together, equally many in each; by default
    each is by itself. The shuffle is seeded by the first of a unit, so it does not depend on their order.
    """
    order = sorted(
        [(place,) for place in range(len(kept))] if units is None else units,
        key=lambda unit: derive_seed("shuffle", seed, step, kept[unit[0]].group_id, kept[unit[0]].candidate),
    )
    whole = [_items(order[u::updates], kept) for u in range(updates)]
    return [[_share(items, rank, ranks) for items in whole if items] for rank in range(ranks)]


def _items(units: Sequence[Sequence[int]], kept: Sequence[Kept]) -> list[list[Item]]:
    count = sum(map(len, units))
    return [
        [
            Item(trajectory=i, group_id=kept[i].group_id, advantage=kept[i].advantage, weight=1 / count)
            for i in unit
        ]
        for unit in units
    ]


def _share(units: Sequence[Sequence[Item]], rank: int, ranks: int) -> list[Item]:
    size = -(-len(units) // ranks)
    mine = list(units[rank::ranks])
    filler = [replace(item, advantage=0.0, weight=0.0) for item in units[0]]
    return list(chain(*mine, *[filler] * (size - len(mine))))
