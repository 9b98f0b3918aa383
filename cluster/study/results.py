"""The results of a comparison, computed from the study's Parquet files alone."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from cluster.record.run_data import evaluated
from cluster.study.arms import BASELINE
from cluster.study.store import Row, read_rows
from selection.analysis.speedup import (
    Advantage,
    Interval,
    Speedup,
    advantage,
    final_score,
    paired_difference,
    speedup,
)
from selection.strategies import Floats

AXES: Final = ("steps", "trained", "sampled", "compute", "seconds", "cpu_seconds")
"""The costs of a comparison. ``compute`` is in forward passes of the transformer, a backward pass counted as
`cluster.study.compare.BACKWARD_COST`; seconds exclude evaluations."""

_STAGES: Final = ("sample", "score", "learn")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRun:
    """One arm on one seed."""

    rows: Sequence[Row]
    about: Row

    @property
    def learning_rate(self) -> float:
        """Its learning rate."""
        return float(tomllib.loads(self.about["config"])["learner"]["learning_rate"])

    @property
    def final(self) -> float:
        """Its final held-out reward."""
        return final_score(self.values("eval_reward"))

    @property
    def evaluations(self) -> list[int]:
        """The indices of the rows with an evaluation."""
        return [place for place, row in enumerate(self.rows) if row.get("eval_reward") is not None]

    def costs(self, axis: str) -> Floats:
        """Return the cumulative cost at each evaluation, by one of `AXES`."""
        spent = np.cumsum([self._spent(row, axis) for row in self.rows])
        return np.asarray(spent[self.evaluations], dtype=np.float64)

    def values(self, name: str) -> Floats:
        """Return an eval_* metric at each evaluation."""
        return np.array([self.rows[place].get(name, np.nan) for place in self.evaluations], dtype=np.float64)

    def _spent(self, row: Row, axis: str) -> float:
        if row["step"] == 0:
            return 0.0
        if axis == "steps":
            return 1.0
        if axis == "compute":
            return float(row["forwards"] + self.about["backward_cost"] * row["backwards"])
        if axis in ("seconds", "cpu_seconds"):
            return float(sum(row[f"{axis}_{stage}"] for stage in _STAGES))
        return float(row[axis])


Runs = Mapping[str, Mapping[int, ArmRun]]
"""Runs by arm and seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """An arm against the baseline: speed-ups by axis, and final held-out metrics with paired differences."""

    arm: str
    seeds: int
    speedups: Mapping[str, Speedup]
    finals: Mapping[str, float]
    differences: Mapping[str, Interval]


def load_runs(folder: Path) -> Runs:
    """Load every finished run of a task's comparison.

    Raises:
        UserError: if a file is not the study's.
    """
    found: dict[str, dict[int, ArmRun]] = {}
    for path in sorted((folder / "compare").glob("*/seed-*.parquet")):
        rows, about = read_rows(path)
        found.setdefault(about["arm"], {})[about["seed"]] = ArmRun(rows=rows, about=about)
    return found


def load_tuning(folder: Path) -> dict[float, Runs]:
    """Load the runs with each of the tried learning rates, by rate.

    Raises:
        UserError: if a file is not the study's.
    """
    found = {float(path.name): load_runs(path) for path in (folder / "tune").glob("*")}
    return {rate: found[rate] for rate in sorted(found)}


def compare_arms(runs: Runs) -> list[Compared]:
    """Compare every arm that shares a seed with the baseline, the baseline first."""
    base = runs.get(BASELINE, {})
    pairs = {arm: sorted(set(base) & set(seeds)) for arm, seeds in runs.items()}
    order = sorted((arm for arm, seeds in pairs.items() if seeds), key=lambda arm: (arm != BASELINE, arm))
    return [
        _compared(arm, [base[s] for s in pairs[arm]], [runs[arm][s] for s in pairs[arm]]) for arm in order
    ]


def final_gains(runs: Runs, arm: str, other: str) -> Interval | None:
    """Return how much higher one arm ends than another, paired by shared seeds; None without any."""
    seeds = sorted(set(runs.get(arm, {})) & set(runs.get(other, {})))
    if not seeds:
        return None
    return paired_difference([runs[other][s].final for s in seeds], [runs[arm][s].final for s in seeds])


def cost_gain(runs: Runs, arm: str, other: str, axis: str) -> Advantage | None:
    """Compare two arms' costs to the baseline's final score, paired by shared seeds; None without any."""
    base = runs.get(BASELINE, {})
    seeds = sorted(set(base) & set(runs.get(arm, {})) & set(runs.get(other, {})))
    if not seeds:
        return None
    ours, theirs = (_curves([runs[name][s] for s in seeds], axis) for name in (arm, other))
    try:
        return advantage([base[s].final for s in seeds], ours, theirs)
    except ValueError:  # a score that is not a number
        return None


def eval_names(run: ArmRun) -> list[str]:
    """List the eval_* metrics of a run, ``eval_reward`` first, without those equal to it or incomplete."""
    reward = run.values("eval_reward")
    others = {key: run.values(key) for key in sorted(evaluated(run.rows))}
    telling = [k for k, v in others.items() if np.isfinite(v).all() and not np.array_equal(v, reward)]
    return ["eval_reward", *telling]


def _compared(arm: str, base: Sequence[ArmRun], runs: Sequence[ArmRun]) -> Compared:
    names = eval_names(base[0])
    finals = {name: [final_score(run.values(name)) for run in runs] for name in names}
    base_finals = {name: [final_score(run.values(name)) for run in base] for name in names}
    return Compared(
        arm=arm,
        seeds=len(runs),
        speedups=_speedups(base, runs),
        finals={name: float(np.mean(values)) for name, values in finals.items()},
        differences={name: paired_difference(base_finals[name], finals[name]) for name in names},
    )


def _speedups(base: Sequence[ArmRun], runs: Sequence[ArmRun]) -> dict[str, Speedup]:
    """Compute the speed-ups by axis; empty if a baseline learnt nothing, so that no score is reachable."""
    try:
        return {axis: speedup(_curves(base, axis), _curves(runs, axis)) for axis in AXES}
    except ValueError:
        return {}


def _curves(runs: Sequence[ArmRun], axis: str) -> list[tuple[Floats, Floats]]:
    return [(run.costs(axis), run.values("eval_reward")) for run in runs]
