"""A run folder as the report reads it: whatever is there, and notes on what is not.

Nothing here needs the process that made the run. An interrupted run leaves a folder with parts missing
or cut off in the middle, so every reader returns what it can and says in a note what it could not.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config.errors import UserError
from cluster.record.nonfinite import BROKEN, EVAL_BROKEN
from rollout.text_files import read_text

Row = Mapping[str, Any]
STAGES: Final = ("sample", "score", "select", "learn", "broadcast")


class NotARunError(UserError):
    """The folder holds no run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run folder says; `metrics` has one row per step, in the order of the steps."""

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
        """The rows that hold an evaluation."""
        return [row for row in self.metrics if number(row, "eval_reward") is not None]

    @property
    def learned_nothing(self) -> bool:
        """Whether there were steps, and none of them, nor one before a resume, applied an update."""
        return bool(self.training) and number(self.training[-1], "updates") == 0

    @property
    def last_step(self) -> int:
        """The last training step that was finished, 0 if none was."""
        return max((int(row["step"]) for row in self.training), default=0)

    @property
    def planned(self) -> int | None:
        """The number of steps that the configuration asked for."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    def section(self, name: str) -> Row:
        """A section of the configuration, empty if the configuration has none."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}


def load_run(folder: Path) -> Run:
    """Read a run folder; raises NotARunError if it is none."""
    if not folder.is_dir():
        raise NotARunError(f"{folder} is not a folder; expected the folder of a run")
    if not any((folder / name).is_file() for name in ("config.toml", "metrics.jsonl")):
        raise NotARunError(f"{folder} is not a run: it has neither config.toml nor metrics.jsonl")
    config, config_notes = _read_config(folder / "config.toml")
    metrics, metrics_notes = _read_metrics(folder / "metrics.jsonl")
    committed = [path.parent for path in folder.glob("checkpoints/step-*/COMMITTED")]
    checkpoint = max(_steps(committed), default=None)
    run = Run(folder=folder, config=config, metrics=metrics, checkpoint=checkpoint, notes=())
    notes = (*config_notes, *metrics_notes, *_progress_notes(run))
    return Run(folder=folder, config=config, metrics=metrics, checkpoint=checkpoint, notes=notes)


def number(row: Row, key: str) -> float | None:
    """A finite number of a row, None if it is absent, empty, infinite or not a number at all."""
    value = row.get(key)
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def evaluated(rows: Iterable[Row]) -> list[str]:
    """What evaluations measured, in the order of the rows; without the count of what they could not."""
    return [key for key in dict.fromkeys(k for row in rows for k in row) if _measures(key)]


def _measures(key: str) -> bool:
    return key.startswith("eval_") and key != EVAL_BROKEN


def series(rows: Iterable[Row], key: str) -> tuple[list[int], list[float]]:
    """The steps at which a metric was recorded, and its values there."""
    points = [(int(row["step"]), value) for row in rows if (value := number(row, key)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def total(rows: Iterable[Row], key: str) -> float:
    """The sum of a metric over rows."""
    return sum(series(rows, key)[1])


def stepped(folder: Path, pattern: str) -> dict[int, Path]:
    """The entries of a folder whose names hold a step, in the order of the steps."""
    found = {step: path for path in folder.glob(pattern) for step in _steps([path])}
    return dict(sorted(found.items()))


def read_table(path: Path) -> list[Row] | None:
    """The rows of a Parquet file, None if it is missing or damaged."""
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
        return {}, ["There is no config.toml, so the page cannot say what the run was asked to do."]
    except (OSError, ValueError) as error:
        return {}, [f"config.toml could not be read: {error}"]


def _read_metrics(path: Path) -> tuple[tuple[Row, ...], list[str]]:
    """Merge the lines of each step: after a resume a step may stand twice, and the later line wins."""
    if not path.is_file():
        return (), ["There is no metrics.jsonl: no step was finished."]
    steps: dict[int, dict[str, Any]] = {}
    broken = []
    for number_, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        row = _parse(line)
        if row is not None:
            steps.setdefault(int(row["step"]), {}).update(row)
        elif line.strip():
            broken.append(str(number_))
    notes = [f"metrics.jsonl: no metrics could be read from line {', '.join(broken)}."] if broken else []
    return tuple(steps[step] for step in sorted(steps)), notes


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _progress_notes(run: Run) -> list[str]:
    notes = []
    if run.planned and run.last_step < run.planned:
        kept = "no checkpoint was committed" if run.checkpoint is None else (
            f"the last committed checkpoint is that of step {run.checkpoint}")  # fmt: skip
        notes.append(f"The run stands at step {run.last_step} of {run.planned}; {kept}.")
    gaps = [(a, b) for a, b in pairwise(int(row["step"]) for row in run.training) if b > a + 1]
    notes += [f"No metrics for steps {a + 1} to {b - 1}." for a, b in gaps[:3]]
    for key, what in ((BROKEN, "images of training"), (EVAL_BROKEN, "held-out images")):
        if count := total(run.metrics, key):
            notes.append(f"{count:.0f} {what} were not finite and have no reward; see nonfinite.jsonl.")
    if not run.evaluations:
        notes.append("No evaluation was recorded, so there is no held-out reward.")
    elif len(run.evaluations) == 1:
        notes.append("Only one evaluation was recorded, so there is no change of the held-out reward.")
    return notes
