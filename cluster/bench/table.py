"""The report of a benchmark: its measurements and the machine; light enough for a driver."""

from __future__ import annotations

import math
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any, ClassVar, Final

import psutil
from rich.table import Table

from cluster.config.errors import UserError
from cluster.record.files import to_json

LIBRARIES: Final = ("diffusers", "transformers", "peft", "deepspeed", "ray")
"""Libraries whose versions a report has, where they are installed."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured quantity: a value per repeat, or a single one, and the bounds within which it is good."""

    name: str
    values: Sequence[float]
    digits: int = 2
    least: float | None = None
    most: float | None = None

    @property
    def good(self) -> bool:
        """True if all values are finite and their median is within the bounds."""
        found = statistics.median(self.values)
        above, below = self.least is None or found >= self.least, self.most is None or found <= self.most
        return above and below and all(map(math.isfinite, self.values))

    def cells(self) -> list[str]:
        """Return median, lowest and highest value as text; of a single value, only that."""
        cells = statistics.median(self.values), min(self.values), max(self.values)
        shown = [f"{cell:,.{self.digits}f}" for cell in cells]
        return shown if len(self.values) > 1 else [shown[0], "", ""]

    def shown(self) -> str:
        """Return name, values and bounds as one line."""
        median, lowest, highest = self.cells()
        bounds = (("at least", self.least), ("at most", self.most))
        wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        spread = f" ({lowest} to {highest})" if lowest else ""
        return f"{self.name}: {median}{spread}" + (f", expected {wanted}" if wanted else "")


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """The results of a benchmark."""

    title: str
    rows: Sequence[Measurement]
    failed: ClassVar[bool] = False

    def table(self) -> Table:
        """Tabulate the median, lowest and highest value of every measurement."""
        table = Table("", "median", "lowest", "highest", title=self.title)
        for row in self.rows:
            table.add_row(row.name, *row.cells())
        return table

    def write(self, path: Path, command: Sequence[str]) -> None:
        """Write every value as JSON, with the command and the machine."""
        rows = {row.name: list(row.values) for row in self.rows}
        fields = {"title": self.title, "command": list(command), "machine": machine(), "rows": rows}
        path.write_text(to_json(fields, indent=2) + "\n", encoding="utf-8")


@cache
def machine() -> dict[str, Any]:
    """Describe the hardware and the versions that results depend on."""
    import torch  # not every benchmark loads it

    return {
        **(_gpu() if torch.cuda.is_available() else {"gpu": None}),
        "cores": psutil.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES if find_spec(name)},
    }


def _gpu() -> dict[str, Any]:
    import torch

    asked = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader", "--id=0"]
    answer = (
        subprocess.run(asked, capture_output=True, text=True, check=False).stdout if which(asked[0]) else ""
    )
    driver, _, memory = answer.strip().partition(", ")
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver or None,
        "gpu_memory": memory or None,
        "cuda": torch.version.cuda,
    }


def refuse_arguments(rest: Sequence[str]) -> None:
    """Refuse the arguments that a benchmark does not have.

    Raises:
        UserError: naming the first one.
    """
    if rest:
        raise UserError(f"{rest[0]}: no such option (--help lists all)")
