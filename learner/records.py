"""What the learner reports of an update and of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Metrics of one batch over all ranks, and what was not finite on this rank.

    ``suspects`` are the trajectories whose loss was not, as places in the selection's kept candidates; a
    gradient can overflow without any. ``broken`` names the parameters that are no longer finite.
    """

    metrics: Mapping[str, float]
    suspects: tuple[int, ...] = ()
    broken: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """The size of a file in bytes and its CRC-32, which the first checkpoints were written without."""

    size: int
    crc32: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a rank has written of a checkpoint: on which machine, and every file by its path there."""

    host: str
    files: Mapping[str, Digest]
