"""The report of a benchmark: its measurements and the machine; light enough for a driver."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from cluster.config.errors import UserError
from cluster.record.files import to_json


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured quantity: a value per repeat, or a single value."""

    name: str
    values: Sequence[float]
    digits: int = 2


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """The results of a benchmark."""

    title: str
    rows: Sequence[Measurement]

    def table(self) -> Table:
        """Tabulate the median, lowest and highest value of every measurement."""
        table = Table("", "median", "lowest", "highest", title=self.title)
        for row in self.rows:
            cells = statistics.median(row.values), min(row.values), max(row.values)
            shown = [f"{cell:,.{row.digits}f}" for cell in cells]
            table.add_row(row.name, *(shown if len(row.values) > 1 else [shown[0], "", ""]))
        return table

    def write(self, path: Path, command: Sequence[str]) -> None:
        """Write every value as JSON, with the command and the machine."""
        rows = {row.name: list(row.values) for row in self.rows}
        fields = {"title": self.title, "command": list(command), "machine": machine(), "rows": rows}
        path.write_text(to_json(fields, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Describe the hardware and the versions that results depend on."""
    import torch  # not every benchmark loads it

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cores": psutil.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def refuse_arguments(rest: Sequence[str]) -> None:
    """Refuse the arguments that a benchmark does not have.

    Raises:
        UserError: naming the first one.
    """
    if rest:
        raise UserError(f"{rest[0]}: no such option (--help lists all)")
