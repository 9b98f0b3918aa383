"""The view of a run's progress in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.record.json_lines import Row
from cluster.record.names import STAGES
from cluster.report.numbers import MISSING, duration, show
from cluster.watch.follower import Watched

BARS: Final = "▁▂▃▄▅▆▇█"
WIDTH: Final = 44
COLOURS: Final = {
    "running": "green",
    "finished": "green",
    "stopped": "yellow",
    "silent": "red",
    "failed": "red",
}
SHOWN: Final = 6
"""Latest events that are shown."""


def view(name: str, run: Watched) -> RenderableType:
    """Render the state of a run on one screen."""
    return Panel(
        Group(_progress(run), _curves(run), _stages(run), _health(run), _events(run)),
        title=Text.assemble(name, "  ", (run.state, f"bold {COLOURS[run.state]}")),
        title_align="left",
    )


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Draw values as a row of bars, averaging neighbours if there are too many; NaN is a gap."""
    size = max(1, math.ceil(len(values) / width))
    means = [_mean(values[i : i + size]) for i in range(0, len(values), size)]
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return ""
    low, spread = min(finite), (max(finite) - min(finite)) or 1.0
    top = len(BARS) - 1
    return "".join(BARS[round(top * (v - low) / spread)] if math.isfinite(v) else " " for v in means)


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _numbers(rows: Iterable[Row], key: str) -> list[float]:
    return [math.nan if (value := row.get(key)) is None else float(value) for row in rows]


def _progress(run: Watched) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    left = "" if run.ended or run.left is None else f"{duration(run.left)} left"
    age = "" if run.age is None or run.ended else f"last update {duration(run.age)} ago"
    bar = ProgressBar(total=max(1, run.planned), completed=run.step, width=30)
    row.add_row(f"step {run.step}/{run.planned}", bar, left, age)
    return row


def _curves(run: Watched) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    curves = (
        ("reward", run.steps, "reward_mean"),
        ("margin", run.steps, "margin_mean"),
        ("held-out", run.evaluations, "eval_reward"),
    )
    for label, rows, key in curves:
        values = _numbers(rows, key)
        ends = f"{show(values[0])} to {show(values[-1])}" if values else MISSING
        table.add_row(label, Text(sparkline(values), "cyan"), ends)
    return table


def _stages(run: Watched) -> RenderableType:
    """Tabulate the mean seconds of the last steps by stage, and the share of each stage."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    means = {stage: _mean(_numbers(run.recent, f"seconds_{stage}")) for stage in STAGES}
    whole = _mean(_numbers(run.recent, "seconds_step"))
    table.add_column("seconds")
    for stage in (*means, "step"):
        table.add_column(stage, justify="right")
    table.add_row("mean", *(show(value) for value in (*means.values(), whole)))
    table.add_row("share", *(_percent(value / whole) if whole else MISSING for value in means.values()))
    return table


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else MISSING


def _health(run: Watched) -> RenderableType:
    last: Row = run.steps[-1] if run.steps else {}
    missing = sum(row.get("candidates", 0) - row.get("valid", 0) for row in run.steps)
    facts = {
        "staleness": last.get("staleness"),
        "starts": run.counted("run started") or None,
        "actors replaced": run.counted("actor replaced"),
        "calls failed": run.counted("call failed"),
        "rewards missing": int(missing),
        "updates skipped": int(sum(row.get("skipped_updates") or 0 for row in run.steps)),
        "checkpoint": max((row["checkpoint"] for row in run.events if "checkpoint" in row), default=None),
    }
    numbers = Text("   ".join(f"{name} {show(value)}" for name, value in facts.items()))
    alarms = {
        name: (row["step"], why) for row in run.steps for name, why in (row.get("alarms") or {}).items()
    }
    lines = [Text(f"guard: {name} {why} (step {step})", "red") for name, (step, why) in alarms.items()]
    return Group(numbers, *lines)


def _events(run: Watched) -> RenderableType:
    lines = [_event(row) for row in run.events[-SHOWN:]]
    return Group(Text("events", "dim"), *lines) if lines else Text("no events yet", "dim")


def _event(row: Row) -> Text:
    """Format an event as one line of plain text: its fields may contain markup or control characters."""
    rest = {k: v for k, v in row.items() if k not in ("time", "level", "event", "run")}
    fields = "  ".join(f"{key}={value}" for key, value in rest.items())
    text = f"{row['time'][:19].replace('T', ' ')}  {row['event']}  {fields}"
    return Text(
        "".join(c if c.isprintable() else " " for c in text), "yellow" if row["level"] != "info" else ""
    )
