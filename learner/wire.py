"""Spread a rank's part of an update into flat arguments, which Ray resolves, and gather it from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from learner.rank_shares import RankUpdate


def spread(work: RankUpdate) -> tuple[Any, ...]:
    """Take the handles out of a rank's update: the update without them, conditionings, trajectories."""
    small = replace(
        work,
        conditionings=dict.fromkeys(work.conditionings),
        trajectories=dict.fromkeys(work.trajectories),
    )
    return small, *work.conditionings.values(), *work.trajectories.values()


def gather(arguments: Sequence[Any]) -> tuple[RankUpdate]:
    """Put the values of the handles, in the order of `spread`, back; the arguments of the worker's method."""
    small, *values = arguments
    count = len(small.conditionings)
    work = replace(
        small,
        conditionings=dict(zip(small.conditionings, values[:count], strict=True)),
        trajectories=dict(zip(small.trajectories, values[count:], strict=True)),
    )
    return (work,)
