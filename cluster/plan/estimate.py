"""The records of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """FLOP/s of a GPU in passes of the sampler and in updates, decoded pixels a second, and their source.

    Without a measurement of decoding, it follows from the operations.
    """

    sampling: float
    learning: float
    basis: str
    pixels: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The available GPUs: number, bytes, speed, and price per hour."""

    gpus: int
    memory: float
    speed: Speed
    price: float | None = None

    def need(self, role: str, count: int, gpus: float, parts: Mapping[str, float]) -> Need:
        """Return the need of a role, with the memory of the GPUs that a process is on."""
        return Need(role, count, gpus, parts, max(1, gpus) * self.memory)


@dataclass(frozen=True, slots=True)
class Need:
    """The bytes that one process of a role needs, by part, and the bytes available to it.

    These are its GPU's, which it may share with others, or the machine's memory. Without parts the need is
    unknown.
    """

    role: str
    count: int
    gpus: float
    parts: Mapping[str, float]
    available: float

    @property
    def total(self) -> float:
        """The bytes of one process."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """True if one process, alone, fits into the available memory."""
        return self.total <= self.available


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a forward pass of a role: the key that sets them, their number, and the most there are."""

    key: str
    role: str
    size: int
    most: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """The seconds of every stage of a step, the needs of every role, and the basis of the estimate.

    ``parts`` are seconds of work within stages, which may overlap.
    """

    stages: Mapping[str, float]
    needs: Sequence[Need]
    overlaps: bool
    basis: str
    parts: Mapping[str, float] = field(default_factory=dict)
    batches: Sequence[Batch] = ()

    @property
    def step(self) -> float:
        """The seconds of a step: the sum of the stages, or the longest one if they overlap."""
        return max(self.stages.values()) if self.overlaps else sum(self.stages.values())
