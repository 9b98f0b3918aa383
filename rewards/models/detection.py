"""The record of a detected object, which detectors and GenEval's rules share."""

from __future__ import annotations

from dataclasses import dataclass

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One detected object: its class, confidence in [0, 1], box and colour.

    ``box`` is (x0, y0, x1, y1) in pixels with y growing downwards; ``color`` is None when unknown.
    """

    kind: str
    confidence: float
    box: Box
    color: str | None = None
