"""The final table of a run, for the console."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from cluster.record.run_data import RecordedRun, load_run, total
from cluster.report.numbers import duration
from cluster.report.summary import changes, headline, stage_costs, steps_of


def summary_table(folder: Path) -> Table:
    """Tabulate the changes and times of a run, for the console."""
    run = load_run(folder)
    table = Table(title=f"{headline(run).task}: {steps_of(run) or 'no'} steps", title_justify="left")
    table.add_column("")
    for name in ("start", "end", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in changes(run):
        table.add_row(item.name, *item.cells)
    if run.training:
        _add_times(table, run)
    return table


def _add_times(table: Table, run: RecordedRun) -> None:
    table.add_section()
    table.add_row("time", "per step", "total", "share", style="bold")
    for stage in stage_costs(run):
        table.add_row(stage.name, duration(stage.per_step), duration(stage.seconds), f"{stage.share:.0%}")
    whole = total(run.training, "seconds_step")
    table.add_row("whole step", duration(whole / len(run.training)), duration(whole), "")
    evaluation = total(run.metrics, "seconds_eval")
    if evaluation:
        table.add_row("evaluation", "", duration(evaluation), "")
