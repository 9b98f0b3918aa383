"""Atomic files, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.files import atomic


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically, as UTF-8."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file atomically (see `rollout.files.atomic`) and return its path."""
    with atomic(path) as draft:
        draft.write_bytes(content)
    return path


def to_json(value: Any, **options: Any) -> str:
    """Write a value as JSON, NaN and infinity as null, since JSON has no such numbers.

    ``options`` are those of `json.dumps`.
    """
    return json.dumps(_plain(value), allow_nan=False, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
