"""What a plan is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The GPUs at hand: how many, bytes of each, FLOP/s in bfloat16, the share of that one expects, price."""

    gpus: int
    memory: float
    flops: float
    share: float
    price: float | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one process of a role, by what they hold, and what it has.

    That is its part of a GPU, or the machine's memory. Without parts a need is not known.
    """

    role: str
    count: int
    gpus: float
    parts: Mapping[str, float]
    available: float

    @property
    def total(self) -> float:
        """Bytes of one process."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether one process has room."""
        return self.total <= self.available


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of every stage of a step, needs of every role, whether stages overlap, and what it rests on."""

    stages: Mapping[str, float]
    needs: Sequence[Need]
    overlaps: bool
    basis: str

    @property
    def step(self) -> float:
        """Seconds of a step: one stage after the other, or with staleness the longest alone."""
        return max(self.stages.values()) if self.overlaps else sum(self.stages.values())
