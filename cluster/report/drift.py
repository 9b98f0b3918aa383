"""Draw the drift guard's chart: what it watches, relative to where it started."""

from __future__ import annotations

from itertools import cycle
from typing import Final

import plotly.graph_objects as go

from cluster.record.run_data import RecordedRun, series
from cluster.report.charts import LIGHT, Chart, chart_of, moving_average

_WATCHED_COLORS: Final = ("accent", "high", "low", "score", "learn", "sample", "select", "soft")


def guard_chart(run: RecordedRun) -> Chart | None:
    """Draw what the drift guard watches, relative to its start; a cross marks an alarm."""
    traces = [
        trace
        for key, color in zip(_watched(run), cycle(_WATCHED_COLORS))
        for trace in _relative_line(run, key, color)
    ]
    note = "Statistics of the sampled images, and rewards that only watch, as multiples of their start."
    return chart_of("guard", "Drift from the start", note, traces, "wide", yaxis_ticksuffix=" x")


def _watched(run: RecordedRun) -> list[str]:
    listed = run.config.get("eval_rewards") or []
    watching = [f"eval_{reward.get('name')}" for reward in listed if reward.get("weight") == 0]
    return [*dict.fromkeys(key for row in run.metrics for key in row if key.startswith("image_")), *watching]


def _relative_line(run: RecordedRun, key: str, color: str) -> list[go.Scatter]:
    """The mean of the latest steps over that of the first, which is what the guard compares."""
    steps, values = series(run.metrics, key)
    width = int(run.section("guard").get("steps", 5)) if key.startswith("image_") else 1
    start = sum(values[:width]) / width
    if len(values) < width or start == 0:
        return []
    shares = [value / start for value in moving_average(values, width)]
    name = key.removeprefix("image_").removeprefix("eval_").replace("_", " ")
    shared = {"legendgroup": key, "hovertemplate": "%{y:.3g} x"}
    line = {"color": LIGHT[color], "width": 2, "dash": "solid" if key.startswith("image_") else "dash"}
    traces = [go.Scatter(x=steps, y=shares, name=name, mode="lines", line=line, **shared)]
    alarmed = {int(row["step"]) for row in run.metrics if key in (row.get("alarms") or ())}
    marks = [(step, share) for step, share in zip(steps, shares, strict=True) if step in alarmed]
    if marks:
        cross = {"symbol": "x", "size": 11, "color": LIGHT[color]}
        x, y = zip(*marks, strict=True)
        traces.append(go.Scatter(x=x, y=y, mode="markers", marker=cross, showlegend=False, **shared))
    return traces
