"""Run the arms of a comparison one after the other in this process."""

from __future__ import annotations

import asyncio
import gc
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from cluster.config.errors import UserError
from cluster.config.preflight import Inputs, check
from cluster.config.settings import RunSettings
from cluster.config.sources import to_toml
from cluster.local.in_process import LocalStages, Scorers, load_scorers
from cluster.loop.loop import train
from cluster.loop.run import Run
from cluster.record.held_out import held_out
from cluster.study.arms import arm_settings
from cluster.study.results import load_runs
from cluster.study.rows import RowRecorder
from cluster.study.store import finished, write_rows

BACKWARD_COST: Final = {"parameters": 2.0, "adapter": 1.1}
"""Forward passes that a backward pass costs: gradients of weights and activations, or only of activations."""

_EXTRA: Final = 1_000_000_000
"""The first number of groups beyond the baseline's, which no run reaches otherwise."""

PrintLine = Callable[[str], None]


def arm_path(folder: Path, arm: str, seed: int) -> Path:
    """Return the path of an arm's rows of one seed."""
    return folder / "compare" / arm / f"seed-{seed}.parquet"


def tune(
    base: RunSettings,
    arms: Sequence[str],
    rates: Sequence[float],
    folder: Path,
    command: str,
    print_line: PrintLine,
) -> dict[str, float]:
    """Run every arm with every learning rate on the first seed; return each arm's rate of the highest score.

    Raises:
        UserError: as `compare` and `highest`.
    """
    finals: dict[str, dict[float, float]] = {arm: {} for arm in arms}
    for rate in rates:
        compare(base, arms, 1, tuning_folder(folder, rate), command, print_line, dict.fromkeys(arms, rate))
        tried = load_runs(tuning_folder(folder, rate))
        for arm in arms:
            finals[arm][rate] = tried[arm][base.seed].final
    chosen = {arm: highest(scores) for arm, scores in finals.items()}
    for arm, rate in chosen.items():
        path = arm_path(folder, arm, base.seed)
        if not path.exists():  # reuse the run of the first seed
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(arm_path(tuning_folder(folder, rate), arm, base.seed), path)
    return chosen


def highest(scores: Mapping[float, float]) -> float:
    """Return the learning rate with the highest final score, ignoring those without one (NaN).

    Raises:
        UserError: if none has a score.
    """
    ended = {rate: score for rate, score in scores.items() if math.isfinite(score)}
    if not ended:
        raise UserError(f"--rates: none of {', '.join(map(str, scores))} ends with a held-out reward")
    return max(ended, key=ended.__getitem__)


def tuning_folder(folder: Path, rate: float) -> Path:
    """Return the folder of the runs with one of the tried learning rates, laid out as a comparison."""
    return folder / "tune" / f"{rate:g}"


def compare(
    base: RunSettings,
    arms: Sequence[str],
    seeds: int,
    folder: Path,
    command: str,
    print_line: PrintLine,
    rates: Mapping[str, float] | None = None,
) -> None:
    """Run every arm on every seed that is not finished yet; all arms of a seed before the next seed.

    ``rates`` gives arms learning rates other than the configuration's.

    Raises:
        UserError: if an arm is unknown or does not fit, or the folder has results of other settings.
    """
    rates = rates or {}
    planned = [
        (arm, arm_settings(arm, _varied(base, base.seed + number, rates.get(arm))))
        for number in range(seeds)
        for arm in arms
    ]
    todo = [(arm, settings) for arm, settings in planned if not _done(folder, arm, settings)]
    print_line(f"{len(planned)} runs, {len(planned) - len(todo)} of them finished")
    inputs, scorers = check(base), load_scorers(base)
    for place, (arm, settings) in enumerate(todo, start=1):
        rows = run_arm(settings, base.groups_per_step, inputs, scorers)
        about = {**_about(arm, settings), "command": command}
        write_rows(arm_path(folder, arm, settings.seed), rows, about)
        print_line(f"{place}/{len(todo)}  {arm}, seed {settings.seed}: {_summary(rows)}")


def run_arm(
    settings: RunSettings, base_groups: int, inputs: Inputs, scorers: Scorers
) -> list[dict[str, Any]]:
    """Train an arm; return a row per step with counts and its evaluation if any, row 0 being the start."""
    # The stages alternate in one process, so nothing can be produced ahead.
    lockstep = settings.model_copy(update={"max_staleness": 0})
    stages = LocalStages(lockstep, scorers)
    recorder = RowRecorder(stages, held_out(inputs.held_out, settings))
    numbers = partial(group_ids, base=base_groups, count=settings.groups_per_step)
    asyncio.run(train(Run(lockstep, inputs.train, stages, numbers, [recorder]), 0))
    del stages
    gc.collect()  # an engine and its hooks refer to each other
    return recorder.rows


def group_ids(step: int, base: int, count: int) -> list[int]:
    """Number the ``count`` groups of an arm's step, as many as possible equal to the baseline's ``base``.

    Groups determine prompts and noise, so arms share both: an arm with fewer groups has a part of the
    baseline's, an arm with more has additional ones, and no group occurs twice.
    """
    shared = range(step * base, step * base + min(base, count))
    extra = max(0, count - base)
    return [*shared, *range(_EXTRA + step * extra, _EXTRA + (step + 1) * extra)]


def _varied(base: RunSettings, seed: int, rate: float | None) -> RunSettings:
    learner = base.learner if rate is None else base.learner.model_copy(update={"learning_rate": rate})
    return base.model_copy(update={"seed": seed, "learner": learner})


def _done(folder: Path, arm: str, settings: RunSettings) -> bool:
    return finished(arm_path(folder, arm, settings.seed), _about(arm, settings))


def _about(arm: str, settings: RunSettings) -> dict[str, Any]:
    trained = "adapter" if settings.model.trains_adapter else "parameters"
    return {
        "task": settings.preset,
        "arm": arm,
        "seed": settings.seed,
        "config": to_toml(settings),
        "backward_cost": BACKWARD_COST[trained],
    }


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    steps = rows[1:]
    stages = ("sample", "score", "learn")
    wall, cpu = (
        sum(row[f"{clock}_{stage}"] for row in steps for stage in stages) / len(steps)
        for clock in ("seconds", "cpu_seconds")
    )
    start, end = rows[0]["eval_reward"], rows[-1]["eval_reward"]
    return f"held-out {start:.3f} to {end:.3f}, {wall:.2f} s per step ({cpu:.2f} s of CPU)"
