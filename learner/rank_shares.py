"""The division of an update's trajectories among ranks: equal work per rank, equal weight per trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice

from learner.records import Unit
from rollout.noise import derive_seed
from rollout.records import CandidateGroup, Handle
from selection.records import Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One trajectory of a rank's share: its place in the selection, its group, advantage and weight.

    ``seed`` is of random draws in this step, which a set of a `Unit` shares. Padding repeats a trajectory
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
    units: Sequence[Unit] | None = None,
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
    units: Sequence[Unit] | None = None,
) -> list[list[list[Assignment]]]:
    """Split kept trajectories by update and rank: result[rank][update] is that rank's share of the update.

    Every trajectory of a unit is trained exactly once and weighs 1 / (size of its update), on any rank. By
    default each is a unit of its own. The shuffle is seeded by the first place of a unit, so it does not
    depend on the units' order.
    """
    order = sorted(
        [Unit([(place,)]) for place in range(len(kept))] if units is None else units,
        key=lambda unit: _seed("shuffle", seed, step, kept[unit.sets[0][0]]),
    )
    whole = [_blocks(order[u::updates], kept, seed, step) for u in range(updates)]
    return [[_share(blocks, rank, ranks) for blocks in whole if blocks] for rank in range(ranks)]


def _blocks(units: Sequence[Unit], kept: Sequence[Kept], seed: int, step: int) -> list[list[Assignment]]:
    """List the assignments of an update, in blocks that stay on a rank."""
    weight = 1 / max(1, sum(len(one) for unit in units for one in unit.sets))
    blocks = []
    for unit in units:
        for places in unit.sets:
            drawn = _seed("draws", seed, step, kept[places[0]])
            found = [
                Assignment(
                    trajectory=place,
                    group_id=kept[place].group_id,
                    seed=drawn,
                    advantage=kept[place].advantage,
                    weight=weight,
                )
                for place in places
            ]
            blocks += [found] if unit.whole else [[one] for one in found]
    return blocks


def _seed(name: str, seed: int, step: int, one: Kept) -> int:
    return derive_seed(name, seed, step, one.group_id, one.candidate)


def _share(blocks: Sequence[Sequence[Assignment]], rank: int, ranks: int) -> list[Assignment]:
    """Take a rank's blocks, and pad them to as many assignments as the longest share of a rank has."""
    shares = [list(chain(*blocks[other::ranks])) for other in range(ranks)]
    missing = max(map(len, shares)) - len(shares[rank])
    padding = [replace(one, advantage=0.0, weight=0.0) for one in blocks[0]]
    return [*shares[rank], *islice(cycle(padding), missing)]
