"""Suggestions of the nearest known name, for messages about an unknown one."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def did_you_mean(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """Suggest the known name nearest to an unknown one; empty if none reaches difflib's ratio ``cutoff``."""
    near = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""
