"""What the learner reports of an update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Metrics of one batch over all ranks, and the trajectories whose loss was not finite on this rank.

    ``suspects`` are places in the selection's kept candidates; a gradient can overflow without any.
    """

    metrics: Mapping[str, float]
    suspects: tuple[int, ...] = ()
