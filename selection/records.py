"""The records of the selection stage: kept candidates with their advantages, and statistics of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One candidate for the learner: its group, its position in the group, and its (unclipped) advantage."""

    group_id: int
    candidate: int
    advantage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatistics:
    """Statistics of one group over all of its valid candidates, not only the selected ones.

    ``reward_std`` is the population standard deviation. ``margin`` is the highest minus the lowest reward:
    the widest possible margin, whatever the strategy. Both are zero without a valid candidate.
    """

    group_id: int
    candidates: int
    valid: int
    selected: int
    reward_std: float
    margin: float

    @property
    def dropped(self) -> bool:
        """True if the group has too few valid candidates (under two) to compare any."""
        return self.valid < 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The outcome for a batch: ``kept`` in the order of the groups and worst first within each.

    ``groups`` has one entry per group of the batch; ``metrics`` are numbers for the log:
    reward_mean (of the raw weighted sum over valid candidates; NaN without any); reward_std and margin_mean
    (means over groups that were not dropped); zero_margin_groups; if any, tied_low and tied_high (the lowest
    and the highest raw reward that all candidates of such a group have); dropped_groups; short_groups (valid,
    but fewer than ``keep``); candidates; valid; selected; advantage_rms.
    """

    kept: tuple[Kept, ...]
    groups: tuple[GroupStatistics, ...]
    metrics: Mapping[str, float]
