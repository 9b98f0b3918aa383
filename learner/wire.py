"""Conversion of a rank's part of an update to flat arguments, which Ray resolves, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from learner.rank_shares import RankUpdate


def spread(work: RankUpdate) -> tuple[Any, ...]:
    """Split a rank's update into the update without handles, its conditionings and its trajectories."""
    small = replace(
        work,
        conditionings=dict.fromkeys(work.conditionings),
        trajectories=dict.fromkeys(work.trajectories),
    )
    return small, *work.conditionings.values(), *work.trajectories.values()


def gather(arguments: Sequence[Any]) -> tuple[RankUpdate]:
    """Join what `spread` split, now values instead of handles, to the arguments of the worker's method."""
    small, *values = arguments
    count = len(small.conditionings)
    work = replace(
        small,
        conditionings=dict(zip(small.conditionings, values[:count], strict=True)),
        trajectories=dict(zip(small.trajectories, values[count:], strict=True)),
    )
    return (work,)
