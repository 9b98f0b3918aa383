"""Which rank trains which trajectory in which update: equal work on every rank, equal weight for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.noise import derive_seed
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
