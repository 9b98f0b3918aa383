"""The speed of a GPU: measured by ``bench gpu``, or guessed."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Final

from cluster.config.errors import UserError
from cluster.plan.estimate import Speed

PEAK: Final = 989.0
"""TFLOP/s of an H100 in bfloat16, by its data sheet."""
SHARES: Final = {True: 0.4, False: 0.2}
"""Shares of the data sheet's peak that SD3.5-M reached on H100 and H200, compiled or not (BENCHMARKS.md)."""

MATRIX_PEAK: Final = "peak of matrix products in {} (TFLOP/s)"
IMAGES: Final = "images of a batch"
PIXELS: Final = "pixels of an image"
DECODING: Final = "decoding them (s)"
FORWARD: Final = "forward passes"
LEARNER: Final = "learner"
SHARE: Final = "share of the peak (%)"
"""Names by which ``bench gpu`` writes its measurements, and a plan reads them."""


def guessed(tflops: float, share: float | None, *, compiled: bool) -> Speed:
    """Return a share of a peak as the speed of everything."""
    used = SHARES[compiled] if share is None else share
    flops = used * tflops * 1e12
    how = "of the peak" if share is not None else f"of the peak, a guess for {_how(compiled)} models"
    return Speed(
        sampling=flops, learning=flops,
        basis=f"{flops / 1e12:.0f} TFLOP/s per GPU, {used:.0%} {how} (--measured: a card's own)",
    )  # fmt: skip


def measured(path: Path, *, compiled: bool) -> Speed:
    """Read the speed that ``bench gpu`` wrote to a file.

    Raises:
        UserError: naming the file and what it lacks.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        checks, machine = report["checks"], report["machine"]
        rows = {row["name"]: statistics.median(row["values"]) for check in checks for row in check["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--measured: {path} is no report of 'bench gpu': {error}") from None
    how = _how(compiled)
    peak = 1e10 * _row(path, rows, MATRIX_PEAK.format("bfloat16"))  # a percent of it
    images, pixels = _row(path, rows, f"{how}: {IMAGES}"), _row(path, rows, f"{how}: {PIXELS}")
    return Speed(
        sampling=peak * _row(path, rows, f"{how}: {FORWARD}, {SHARE}"),
        learning=peak * _row(path, rows, f"{how}: {LEARNER}, {SHARE}"),
        pixels=images * pixels / _row(path, rows, f"{how}: {DECODING}"),
        basis=f"{path}, measured on one {machine.get('gpu')} with {how} blocks",
    )


def _how(compiled: bool) -> str:
    return "compiled" if compiled else "not compiled"


def _row(path: Path, rows: dict[str, float], name: str) -> float:
    if name not in rows:
        raise UserError(f"--measured: {path} has no measurement {name!r}; run its check 'step' to the end")
    return rows[name]
