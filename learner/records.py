"""Records of the learner about an update and a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

WEIGHTS: Final = "weights.safetensors"
"""The current weights in a checkpoint."""
AVERAGE: Final = "average.safetensors"
"""Their average in a checkpoint."""
BEHAVIOUR: Final = "behaviour.safetensors"
"""The weights of the policy that samples in a checkpoint, if it follows the trained one slowly."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Kept candidates, by their places, of one optimizer step, in ``sets`` that share a seed.

    The sets of a ``whole`` unit stay on one rank each, in consecutive places.
    """

    sets: Sequence[Sequence[int]]
    whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Metrics of one batch over all ranks, and this rank's trajectories and parameters that are not finite.

    ``suspects`` are the trajectories whose loss is not finite, as places in the selection's kept candidates;
    a gradient can overflow without any. ``broken`` names the parameters that are no longer finite.
    """

    metrics: Mapping[str, float]
    suspects: tuple[int, ...] = ()
    broken: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """The size of a file in bytes and its CRC-32, which is missing in the oldest checkpoints."""

    size: int
    crc32: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A rank's files of a checkpoint, by their paths in its folder, and the host that wrote them."""

    host: str
    files: Mapping[str, Digest]
