"""The report's charts, as Plotly figures in JSON.

Figures are drawn in the light palette; the page's script swaps each colour for its dark counterpart, so
every colour of a palette is unique in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go

from cluster.record.json_lines import Row
from cluster.record.names import STAGES
from cluster.record.run_data import RecordedRun, evaluated, number, series
from learner.objectives.registry import drawn_metrics

LIGHT: Final = {
    "paper": "#f6f4ef", "card": "#fffdfa", "ink": "#20252b", "muted": "#5d6670", "line": "#e2ddd2",
    "high": "#0d7168", "low": "#b04a26", "accent": "#3d4f9f", "soft": "#7c87b6",
    "sample": "#5b87b8", "score": "#c9973f", "select": "#6d9b74", "learn": "#93577a", "broadcast": "#98958c",
}  # fmt: skip
DARK: Final = {
    "paper": "#14171b", "card": "#1c2025", "ink": "#e9e6df", "muted": "#a0a8b0", "line": "#31373e",
    "high": "#52c4b4", "low": "#ec9a6f", "accent": "#a3b1f7", "soft": "#6f7ab0",
    "sample": "#6c9dd6", "score": "#ddb062", "select": "#8fbe97", "learn": "#b97fa1", "broadcast": "#8d8a83",
}  # fmt: skip
_BARS: Final = 120  # above this number of steps, an area draws faster than bars and shows the same
AXIS: Final = {
    "gridcolor": LIGHT["line"],
    "linecolor": LIGHT["line"],
    "tickcolor": LIGHT["line"],
    "zeroline": False,
    "automargin": True,
    "layer": "below traces",
}
LAYOUT: Final = {
    "template": "none",
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, sans-serif", "size": 12.5, "color": LIGHT["muted"]},
    "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
    "hovermode": "x unified",
    "hoverlabel": {"bgcolor": LIGHT["card"], "bordercolor": LIGHT["line"], "font": {"color": LIGHT["ink"]}},
    "legend": {
        "orientation": "h", "yref": "container", "y": 1, "yanchor": "top", "x": 0, "xanchor": "left",
        "traceorder": "normal",
    },
    "bargap": 0.15,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled figure; `size` is `wide`, `half` or `small`."""

    key: str
    title: str
    note: str
    figure: str
    size: str


def learning_charts(run: RecordedRun) -> list[Chart]:
    """Rewards, margins and zero-margin groups over the steps."""
    silent = _most_silent(run.training)
    charts = [
        chart_of(
            "reward",
            "Reward",
            "Held-out evaluations, and the mean reward of all sampled candidates.",
            _reward_traces(run),
            "wide",
            **_unit_range(run),
        ),
        chart_of(
            "margin",
            "Reward margin",
            "Mean distance between the best and the worst kept candidate of a prompt.",
            _trend(run.training, "margin_mean", "margin", "high"),
            "half",
        ),
        chart_of(
            "zero",
            "Groups without a signal",
            "All candidates of a prompt tie, or too few have a valid reward.",
            _group_traces(run.training),
            "half",
            barmode="stack",
            yaxis={"range": [0, 1.05 * silent], "dtick": math.ceil(silent / 5)},
        ),
    ]
    return [chart for chart in charts if chart]


def time_chart(run: RecordedRun) -> Chart | None:
    """Seconds per stage, stacked over the steps."""
    traces = [trace for stage in STAGES for trace in _stage_trace(run.training, stage)]
    overlap = "Stages overlap at this staleness, so that a step takes less than their sum."
    note = overlap if run.config.get("max_staleness") else "Seconds of every stage, step by step."
    return chart_of("time", "Time per stage", note, traces, "wide", barmode="stack", yaxis_ticksuffix=" s")


def diagnostic_charts(run: RecordedRun) -> list[Chart]:
    """Small multiples of what to look at when a run goes wrong."""
    charts = (
        chart_of(m.name, m.title, m.note, _line(run.training, m.name, m.title, "accent"), "small")
        for m in drawn_metrics(run.section("learner"))
    )
    return [chart for chart in charts if chart]


def chart_of(
    key: str, title: str, note: str, traces: Sequence[Any], size: str, **layout: Any
) -> Chart | None:
    """A chart in the page's style; None where there is nothing to draw."""
    if not traces:
        return None
    figure = go.Figure(traces)
    figure.update_layout(LAYOUT, showlegend=len(traces) > 1)
    figure.update_xaxes(AXIS, showgrid=False, ticks="outside", range=_steps(traces))
    figure.update_yaxes(AXIS, nticks=6, exponentformat="power")
    # Evaluations lie on the axis at step 0, and must be whole there.
    figure.update_traces(cliponaxis=False)
    figure.update_layout(margin_t=40 if len(traces) > 1 else 8, **layout)
    return Chart(key, title, note, str(figure.to_json()), size)


def _steps(traces: Sequence[Any]) -> list[float]:
    """The same axis for bars and lines, from before training to half a step after the last."""
    last = max(max(trace.x) for trace in traces)
    return [0, last + 0.6]


def _line(rows: Sequence[Row], key: str, name: str, color: str, **line: Any) -> list[go.Scatter]:
    steps, values = series(rows, key)
    if not steps:
        return []
    # A single point, or a few far apart, would be no line at all.
    mode = "lines+markers" if len(steps) <= 24 else "lines"
    style = {"color": LIGHT[color], "width": 2, **line}
    return [go.Scatter(x=steps, y=values, name=name, mode=mode, line=style, hovertemplate="%{y:.4~g}")]


def _trend(rows: Sequence[Row], key: str, name: str, color: str) -> list[go.Scatter]:
    """The raw metric, faint, under its moving average once there are steps enough for one."""
    steps, values = series(rows, key)
    width = len(steps) // 8
    if width < 2:
        return _line(rows, key, name, color)
    raw = go.Scatter(
        x=steps, y=values, name=f"{name}, each step", mode="lines", opacity=0.5,
        line={"color": LIGHT[color], "width": 1}, hovertemplate="%{y:.4~g}",
    )  # fmt: skip
    smooth = go.Scatter(
        x=steps, y=moving_average(values, width), name=f"{name}, mean of {width} steps", mode="lines",
        line={"color": LIGHT[color], "width": 2.2}, hovertemplate="%{y:.4~g}",
    )  # fmt: skip
    return [raw, smooth]


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values at every place, of fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return [float(mean) for mean in (sums[ends] - sums[starts]) / (ends - starts)]


def _reward_traces(run: RecordedRun) -> list[go.Scatter]:
    """Training below, evaluation above; single rewards, whose scales differ, wait in the legend."""
    traces = _trend(run.training, "reward_mean", "training", "soft")
    for key in _single_rewards(run):
        single = _line(run.metrics, key, f"held-out {key.removeprefix('eval_')}", "learn", dash="dot")
        traces += [trace.update(visible="legendonly") for trace in single]
    traces += _line(run.metrics, "eval_strict", "held-out strict", "high", dash="dash")
    traces += _line(run.metrics, "eval_reward", "held-out reward", "accent", width=3)
    return traces


def _single_rewards(run: RecordedRun) -> list[str]:
    """The evaluated rewards that are not the whole under another name."""
    whole = series(run.metrics, "eval_reward")
    others = {*evaluated(run.evaluations)} - {"eval_reward", "eval_strict", "eval_win_rate"}
    return sorted(key for key in others if series(run.metrics, key) != whole)


def _unit_range(run: RecordedRun) -> dict[str, Any]:
    """Rewards that stay in [0, 1] are shown on all of it, so that a small gain looks small."""
    keys = ("reward_mean", "eval_reward", "eval_strict")
    values = [value for key in keys for value in series(run.metrics, key)[1]]
    return {"yaxis_range": [0, 1.03]} if values and min(values) >= 0 and max(values) <= 1 else {}


def _group_traces(rows: Sequence[Row]) -> list[go.Bar]:
    names = (("zero_margin_groups", "all candidates tie", "soft"), ("dropped_groups", "dropped", "low"))
    return [
        go.Bar(x=steps, y=values, name=name, marker={"color": LIGHT[color], "line": {"width": 0}})
        for key, name, color in names
        for steps, values in [series(rows, key)]
        if steps
    ]


def _most_silent(rows: Sequence[Row]) -> float:
    """The height of the chart of silent groups: at least one group, so that none at all looks like none."""
    counts = [sum(number(row, key) or 0 for key in ("zero_margin_groups", "dropped_groups")) for row in rows]
    return max([1.0, *counts])


def _stage_trace(rows: Sequence[Row], stage: str) -> list[Any]:
    steps, values = series(rows, f"seconds_{stage}")
    if not steps:
        return []
    shared = {"x": steps, "y": values, "name": stage, "hovertemplate": "%{y:.3~g} s"}
    if len(steps) <= _BARS:
        return [go.Bar(**shared, marker={"color": LIGHT[stage], "line": {"width": 0}})]
    style = {"color": LIGHT[stage], "width": 0.5}
    return [go.Scatter(**shared, mode="lines", stackgroup="time", line=style, fillcolor=LIGHT[stage])]
