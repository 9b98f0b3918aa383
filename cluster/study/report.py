"""RESULTS.md and the study's page, from the Parquet files of every task in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.config.errors import UserError
from cluster.record.files import write_text
from cluster.record.names import REPORT
from cluster.report.charts import DARK, LIGHT, Chart
from cluster.report.html import assets, environment, script_json
from cluster.study.charts import learning_charts, rank_chart, ratio_chart, variance_chart
from cluster.study.designs import Variance, drafts_path, load_drafts, load_variance, variance_path
from cluster.study.findings import findings
from cluster.study.results import Compared, Runs, compare_arms, load_runs, load_tuning
from cluster.study.sheet import Sheet
from cluster.study.store import Row, read_about
from cluster.study.tables import (
    draft_sheet,
    final_sheet,
    gradient_sheet,
    ledger_sheet,
    published_sheet,
    rank_sheet,
    speed_sheet,
    tuning_sheet,
    variance_sheet,
)

_INTRO: Final = (
    "The variance of reward and gradient on the bundled tasks, and the learning speed and cost of objectives "
    "and selection rules. Written by `python -m cluster.study report` from the Parquet files of the runs; "
    "`make study` makes those. Arms share seeds, prompts and evaluation noise. To Flow-GRPO the initial "
    "noise is state, and only the SDE path is the policy's own action: of the noise's effect, its gradient "
    "can credit the path's part alone. To an objective on the forward process, a candidate of an ODE is its "
    "initial noise, and is credited as a whole. A ratio marked ≤ is an upper bound: seeds that never reached "
    "the score count as the whole run."
)


_FOLDER: Final = re.compile(r" --folder[ =]\S+")
"""The folder in a command, which is specific to a machine and changes no number."""
_SEEDS: Final = re.compile(r" --seeds[ =](\d+)")
_DYNAMICS: Final = ("sde", "ode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: its tables, its charts, its runs, and the origins of its results."""

    name: str
    sheets: Sequence[Sheet]
    charts: Sequence[Chart]
    runs: Runs
    compared: Sequence[Compared]
    origins: Sequence[str]


def write_study(folder: Path, results: Path) -> list[Path]:
    """Write ``results`` and ``folder``/report.html, and return both paths.

    Raises:
        UserError: if the folder has no results.
    """
    folders = sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []
    tasks = [task for path in folders if (task := _task(path)) is not None]
    if not tasks:
        raise UserError(
            f"{folder} has no results in a task's folder: run `python -m cluster.study variance PRESET` "
            "first, or name the folder above the task's"
        )
    compared = {task.name: task.compared for task in tasks if task.compared}
    published = published_sheet(compared) if compared else None
    found = findings(compared, {task.name: task.runs for task in tasks})
    sentences = [finding.sentence for finding in found]
    return [
        write_text(results, _markdown(tasks, sentences, published)),
        write_text(folder / REPORT, _page(tasks, sentences, published)),
    ]


def _task(folder: Path) -> Task | None:
    variance, runs = load_variance(folder), load_runs(folder)
    without = load_variance(folder, "ode")
    drafts = {kind: found for kind in _DYNAMICS if (found := load_drafts(folder, kind))}
    if variance is None and without is None and not drafts and not runs:
        return None
    compared, tuned = compare_arms(runs), load_tuning(folder)
    key = folder.name
    sheets, charts = _variance_parts(key, variance) if variance else ([], [])
    sheets += [variance_sheet(without)] if without else []
    sheets += [draft_sheet(found, kind) for kind, found in drafts.items()]
    if compared:
        sheets += [speed_sheet(compared), final_sheet(compared), ledger_sheet(runs)]
        sheets += [tuning_sheet(tuned, runs)] if tuned else []
        charts += [chart for chart in (ratio_chart(key, compared), *learning_charts(key, runs)) if chart]
    return Task(
        name=key, sheets=sheets, charts=charts, runs=runs, compared=compared, origins=_origins(folder, runs)
    )


def _variance_parts(key: str, variance: Variance) -> tuple[list[Sheet], list[Chart]]:
    sheets, charts = [variance_sheet(variance)], [variance_chart(key, variance)]
    if variance.gradients is not None:
        sheets += [gradient_sheet(variance.gradients), rank_sheet(variance.gradients)]
        charts.append(rank_chart(key, variance.gradients))
    return sheets, charts


def _origins(folder: Path, runs: Runs) -> list[str]:
    """List the commands, seeds and machines of the results, each once, a comparison by its last extension."""
    paths = [path(folder, dynamics) for path in (variance_path, drafts_path) for dynamics in _DYNAMICS]
    abouts: list[Row] = [read_about(path) for path in paths if path.exists()]
    abouts += [run.about for seeds in runs.values() for run in seeds.values()]
    if not abouts:
        return []
    commands: dict[str, str] = {}
    for about in sorted(abouts, key=_seeds):
        command = _FOLDER.sub("", about["command"])
        machine = f"on {about['cores']} cores of {about['processor']}, Python {about['python']}"
        commands[_SEEDS.sub("", command) + machine] = f"`{command}` {machine}"
    seeds = sorted({seed for found in runs.values() for seed in found})
    loads = [float(about["load"]) for about in abouts]
    counted = f"seeds {', '.join(map(str, seeds))}; " if seeds else ""
    return [*commands.values(), f"{counted}load of the machine from {min(loads)} to {max(loads)}"]


def _seeds(about: Row) -> int:
    found = _SEEDS.search(about["command"])
    return int(found.group(1)) if found else 0


def _markdown(tasks: Sequence[Task], sentences: Sequence[str], published: Sheet | None) -> str:
    parts = ["# Results", _INTRO]
    parts += ["\n".join(f"- {sentence}" for sentence in sentences)] if sentences else []
    parts += [published.markdown()] if published else []
    for task in tasks:
        parts.append(f"## {task.name}")
        parts += [sheet.markdown() for sheet in task.sheets]
        parts.append("Made by:\n\n" + "\n".join(f"- {origin}" for origin in task.origins))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _page(tasks: Sequence[Task], sentences: Sequence[str], published: Sheet | None) -> str:
    drawn = [chart for task in tasks for chart in task.charts]
    return (
        environment(Path(__file__).parent)
        .get_template("study.html.j2")
        .render(
            intro=_INTRO.replace("`", ""),
            tasks=tasks,
            sentences=sentences,
            published=published,
            palettes={"light": LIGHT, "dark": DARK},
            figures=script_json({chart.key: json.loads(chart.figure) for chart in drawn}),
            colors=script_json({LIGHT[name]: DARK[name] for name in LIGHT}),
            assets=assets(),
        )
    )
