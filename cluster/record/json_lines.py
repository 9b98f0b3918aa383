"""Read the JSON lines of a run folder, which a kill may have cut short."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


def complete_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Parse the lines that end in a newline; return them and the number of bytes that they take.

    A last line without its newline is being written, or was cut short by a kill.

    Raises:
        ValueError: if a complete line is not JSON.
    """
    whole, newline, _ = content.rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines() if line.strip()], len(whole) + len(newline)


def metric_lines(content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """Parse every line that has the metrics of a step; return them and the numbers of the damaged lines."""
    found, damaged = [], []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is None:
            damaged.append(number)
        else:
            found.append(row)
    return found, damaged


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
