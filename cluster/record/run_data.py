"""Read a run folder for its report: all that is readable, and notes on the rest.

An interrupted run leaves a folder with parts missing or cut off in the middle, so every reader returns what
it can read, and notes what it cannot.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config.errors import UserError
from cluster.record.json_lines import Row, metric_lines
from cluster.record.names import CHECKPOINTS, CONFIG, MARKER, METRICS, NONFINITE
from cluster.record.nonfinite import BROKEN, EVAL_BROKEN
from rollout.text_files import read_text


class NotARunError(UserError):
    """The folder is not that of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """The content of a run folder; `metrics` has one row per step, in the order of the steps."""

    folder: Path
    config: Row
    metrics: tuple[Row, ...]
    checkpoint: int | None
    notes: tuple[str, ...]

    @property
    def training(self) -> list[Row]:
        """The rows of training steps."""
        return [row for row in self.metrics if row["step"] > 0 and "reward_mean" in row]

    @property
    def evaluations(self) -> list[Row]:
        """The rows with an evaluation."""
        return [row for row in self.metrics if number(row, "eval_reward") is not None]

    @property
    def learned_nothing(self) -> bool:
        """True if there were steps, and none of them, nor one before a resume, applied an update."""
        return bool(self.training) and number(self.training[-1], "updates") == 0

    @property
    def last_step(self) -> int:
        """The last finished training step, 0 without any."""
        return max((int(row["step"]) for row in self.training), default=0)

    @property
    def planned(self) -> int | None:
        """The number of steps in the configuration."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    def section(self, name: str) -> Row:
        """Return a section of the configuration, empty if it is missing."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}


def load_run(folder: Path) -> RecordedRun:
    """Read a run folder.

    Raises:
        NotARunError: if it is not the folder of a run.
    """
    if not folder.is_dir():
        raise NotARunError(f"{folder} is not a folder; expected the folder of a run")
    if not any((folder / name).is_file() for name in (CONFIG, METRICS)):
        raise NotARunError(f"{folder} is not a run: it has neither {CONFIG} nor {METRICS}")
    config, config_notes = _read_config(folder / CONFIG)
    metrics, metrics_notes = _read_metrics(folder / METRICS)
    committed = [path.parent for path in folder.glob(f"{CHECKPOINTS}/step-*/{MARKER}")]
    checkpoint = max(_steps(committed), default=None)
    run = RecordedRun(folder=folder, config=config, metrics=metrics, checkpoint=checkpoint, notes=())
    return replace(run, notes=(*config_notes, *metrics_notes, *_progress_notes(run)))


def number(row: Row, key: str) -> float | None:
    """Return a finite number of a row; None if it is absent, empty, not finite or not a number."""
    value = row.get(key)
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def evaluated(rows: Iterable[Row]) -> list[str]:
    """List the metrics of evaluations, in the order of the rows; without the count of broken images."""
    return [key for key in dict.fromkeys(k for row in rows for k in row) if _measures(key)]


def _measures(key: str) -> bool:
    return key.startswith("eval_") and key != EVAL_BROKEN


def series(rows: Iterable[Row], key: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a metric was recorded, and its values there."""
    points = [(int(row["step"]), value) for row in rows if (value := number(row, key)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def total(rows: Iterable[Row], key: str) -> float:
    """Sum a metric over rows."""
    return sum(series(rows, key)[1])


def stepped(folder: Path, pattern: str) -> dict[int, Path]:
    """List the entries of a folder whose names contain a step, in the order of the steps."""
    found = {step: path for path in folder.glob(pattern) for step in _steps([path])}
    return dict(sorted(found.items()))


def read_table(path: Path) -> list[Row] | None:
    """Read the rows of a Parquet file; None if it is missing or damaged."""
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException):
        return None
    return rows


def _steps(paths: Iterable[Path]) -> list[int]:
    matches = (re.fullmatch(r"[a-z]+-(\d+)(\.parquet)?", path.name) for path in paths)
    return [int(match[1]) for match in matches if match]


def _read_config(path: Path) -> tuple[Row, list[str]]:
    try:
        return tomllib.loads(read_text(path)), []
    except FileNotFoundError:
        return {}, [f"There is no {CONFIG}, so the page cannot show the configuration of the run."]
    except (OSError, ValueError) as error:
        return {}, [f"{CONFIG} could not be read: {error}"]


def _read_metrics(path: Path) -> tuple[tuple[Row, ...], list[str]]:
    """Merge the lines of each step: after a resume a step may have two lines, and the later one counts."""
    if not path.is_file():
        return (), [f"There is no {METRICS}: no step was finished."]
    steps: dict[int, dict[str, Any]] = {}
    rows, damaged = metric_lines(path.read_bytes())
    for row in rows:
        steps.setdefault(int(row["step"]), {}).update(row)
    lines = ", ".join(map(str, damaged))
    notes = [f"{METRICS}: no metrics could be read from line {lines}."] if damaged else []
    return tuple(steps[step] for step in sorted(steps)), notes


def _progress_notes(run: RecordedRun) -> list[str]:
    notes = []
    if run.planned and run.last_step < run.planned:
        kept = "no checkpoint was committed" if run.checkpoint is None else (
            f"the last committed checkpoint is that of step {run.checkpoint}")  # fmt: skip
        notes.append(f"The run is at step {run.last_step} of {run.planned}; {kept}.")
    gaps = [(a, b) for a, b in pairwise(int(row["step"]) for row in run.training) if b > a + 1]
    notes += [f"No metrics for steps {a + 1} to {b - 1}." for a, b in gaps[:3]]
    for key, what in ((BROKEN, "images of training"), (EVAL_BROKEN, "held-out images")):
        if count := total(run.metrics, key):
            notes.append(f"{count:.0f} {what} were not finite and have no reward; see {NONFINITE}.")
    if not run.evaluations:
        notes.append("No evaluation was recorded, so there is no held-out reward.")
    elif len(run.evaluations) == 1:
        notes.append("Only one evaluation was recorded, so there is no change of the held-out reward.")
    return notes
