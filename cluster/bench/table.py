"""What a benchmark reports: the spread of what was measured, and the machine. Light enough for a driver."""

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
class Row:
    """A line of the result: one value per repeat, or a single fact."""

    name: str
    values: Sequence[float]
    digits: int = 2


@dataclass(frozen=True, slots=True)
class Report:
    """What a benchmark found."""

    title: str
    rows: Sequence[Row]

    def table(self) -> Table:
        """For reading: median, lowest and highest of every row."""
        table = Table("", "median", "lowest", "highest", title=self.title)
        for row in self.rows:
            cells = statistics.median(row.values), min(row.values), max(row.values)
            shown = [f"{cell:,.{row.digits}f}" for cell in cells]
            table.add_row(row.name, *(shown if len(row.values) > 1 else [shown[0], "", ""]))
        return table

    def write(self, path: Path, command: Sequence[str]) -> None:
        """For machines: every value, with the command and the machine."""
        rows = {row.name: list(row.values) for row in self.rows}
        found = {"title": self.title, "command": list(command), "machine": machine(), "rows": rows}
        path.write_text(to_json(found, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """The hardware and the versions that figures depend on."""
    import torch  # not every benchmark has it in its process

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cores": psutil.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def no_more(rest: Sequence[str]) -> None:
    """Refuse arguments that mean nothing to a benchmark.

    Raises:
        UserError: naming the first one.
    """
    if rest:
        raise UserError(f"{rest[0]}: no such option (--help lists all)")
