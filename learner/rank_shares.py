"""Which rank trains which trajectory in which update: equal work on every rank, equal weight for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    kept: Sequence[Kept], groups: Sequence[CandidateGroup], *, ranks: int, updates: int, seed: int, step: int
) -> list[RankUpdate]:
    """Split a step's kept candidates over ranks, each with handles of no more than it trains on."""
    by_id = {group.group_id: group for group in groups}
    found = []
    for mine in shares(kept, ranks=ranks, updates=updates, seed=seed, step=step):
        owners = sorted({item.group_id for share in mine for item in share})
        numbers = sorted({item.trajectory for share in mine for item in share})
        handles = {n: by_id[kept[n].group_id].trajectories[kept[n].candidate] for n in numbers}
        conditionings = {owner: by_id[owner].conditioning for owner in owners}
        found.append(RankUpdate(shares=mine, conditionings=conditionings, trajectories=handles))
    return found


def shares(kept: Sequence[Kept], *, ranks: int, updates: int, seed: int, step: int) -> list[list[list[Item]]]:
    """Split kept trajectories by update and rank: result[rank][update] lists that rank's items.

    Every trajectory is trained exactly once and weighs 1 / (size of its update), whatever the rank it
    lands on. The shuffle is seeded by trajectory, so it does not depend on the order of ``kept``.
    """
    order = sorted(
        range(len(kept)),
        key=lambda i: derive_seed("shuffle", seed, step, kept[i].group_id, kept[i].candidate),
    )
    whole = [_items(order[u::updates], kept) for u in range(updates)]
    return [[_share(items, rank, ranks) for items in whole if items] for rank in range(ranks)]


def _items(indices: Sequence[int], kept: Sequence[Kept]) -> list[Item]:
    return [
        Item(trajectory=i, group_id=kept[i].group_id, advantage=kept[i].advantage, weight=1 / len(indices))
        for i in indices
    ]


def _share(items: Sequence[Item], rank: int, ranks: int) -> list[Item]:
    size = -(-len(items) // ranks)
    mine = list(items[rank::ranks])
    filler = Item(trajectory=items[0].trajectory, group_id=items[0].group_id, advantage=0.0, weight=0.0)
    return mine + [filler] * (size - len(mine))
