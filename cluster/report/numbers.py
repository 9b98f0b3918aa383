"""The format of numbers in the report and the final table."""

from __future__ import annotations

import math

MISSING = "–"  # noqa: RUF001 - an en dash marks a missing value in tables
_MINUS = "\u2212"


def show(value: object) -> str:
    """Format a number with three digits, an integer with thin spaces, anything else as its text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING if value is None else str(value)
    if not math.isfinite(value):
        return MISSING
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u2009").replace("-", _MINUS)
    return _decimal(value).replace("-", _MINUS)


def _decimal(value: float) -> str:
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.2e}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}"


def change(start: float, end: float) -> str:
    """Format the difference of two values with its sign."""
    text = show(end - start)
    return text if text.startswith(_MINUS) else f"+{text}"


def duration(seconds: float) -> str:
    """Format a time in one or two units: `1 h 04 min`, `3 min 07 s`, `8.4 s`, `35 ms`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else f"{seconds * 1000:.2f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02d} min"
