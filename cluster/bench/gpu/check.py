"""A check of the suite: its needs, its deadline and its outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from cluster.bench.table import Measurement
from rollout.named import imported

Part = Literal["right", "fast", "whole"]
Status = Literal["running", "passed", "missed", "failed", "skipped"]
SHOWN: Final = {"running": "cyan", "passed": "green", "missed": "yellow", "failed": "red", "skipped": "dim"}
"""Every status, with its colour; a speed below its target is "missed", a wrong result has "failed"."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The device of a check, a folder for its files, and the pipeline that it measures, if any."""

    device: Literal["cuda", "cpu"]
    folder: Path
    model: str = ""

    @property
    def gpus(self) -> int:
        """The value of ``rollout.gpus`` and ``learner.gpus`` of a process that has the device to itself."""
        return int(self.device == "cuda")


class SkippedError(Exception):
    """A check does not apply here, for the reason given."""


@dataclass(frozen=True, slots=True)
class Check:
    """A function that yields bounded measurements, as ``module:function``, and its deadline."""

    part: Part
    name: str
    target: str
    seconds: float
    """The deadline, of a suite of eight minutes."""
    packages: tuple[str, ...] = ()
    model: str = ""

    @property
    def title(self) -> str:
        """The name, with the model if there is one."""
        return f"{self.name} ({self.model})" if self.model else self.name

    def lacks(self) -> str:
        """Name the first package that is not installed, if any."""
        return next((name for name in self.packages if find_spec(name) is None), "")

    def function(self) -> Callable[[Setup], Iterator[Measurement]]:
        """Import the function."""
        found: Callable[[Setup], Iterator[Measurement]] = imported(self.target)
        return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a check: its measurements so far, and the reason if it did not pass."""

    check: Check
    status: Status
    seconds: float
    rows: Sequence[Measurement]
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        fields = {"part": self.check.part, "check": self.check.name, "model": self.check.model or None}
        rows = [{name: value for name, value in asdict(row).items() if name != "digits"} for row in self.rows]
        return {
            **fields, "status": self.status, "seconds": self.seconds, "reason": self.reason, "rows": rows,
        }  # fmt: skip


def judged(check: Check, seconds: float, rows: Sequence[Measurement]) -> Outcome:
    """Compare the measurements of a check that came to its end with their bounds."""
    wrong = sum(not row.good for row in rows)
    if not rows:
        return Outcome(check, "failed", seconds, rows, "nothing was measured")
    if not wrong:
        return Outcome(check, "passed", seconds, rows)
    status: Status = "missed" if check.part == "fast" else "failed"
    return Outcome(check, status, seconds, rows, f"{wrong} of {len(rows)} measurements are out of bounds")
