"""The charts of the study, in the palette and style of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go

from cluster.report.charts import AXIS, LAYOUT, LIGHT, Chart
from cluster.study.arms import BASELINE
from cluster.study.designs import Gradients, Variance
from cluster.study.results import ArmRun, Compared, Runs
from selection.analysis.variance import COMPONENTS

_COLORS: Final = {"prompt": "sample", "initial": "score", "interaction": "select", "path": "learn"}
_LINES: Final = ("high", "low", "accent", "sample", "score", "select", "learn", "soft")
_DASHES: Final = ("solid", "dash", "dot")
_AXES: Final = {
    "steps": "training steps",
    "trained": "trajectories trained on",
    "sampled": "trajectories sampled",
    "compute": "transformer passes, in forward passes",
    "seconds": "seconds without evaluation",
}


def variance_chart(key: str, result: Variance) -> Chart:
    """Draw the shares of the reward's variance by component, raw and after group normalisation."""
    both = (result.raw, result.normalised)
    bars = [
        go.Bar(
            name=name, x=["raw", "group-normalised"], y=[100 * parts[name].share for parts in both],
            marker={"color": LIGHT[_COLORS[name]]}, hovertemplate="%{y:.0f}%",
            error_y=_whiskers([parts[name] for parts in both]),
        )
        for name in COMPONENTS
    ]  # fmt: skip
    return _chart(
        f"{key}-variance", "Components of the reward's variance", "Shares with 95% intervals.", bars,
        "half",
        barmode="group", yaxis={"ticksuffix": "%", "range": [0, 105]},
    )  # fmt: skip


def rank_chart(key: str, gradients: Gradients) -> Chart:
    """Draw the cosine of each margin rank's pair with the other prompts' gradient."""
    ranks = gradients.ranks
    bars = go.Bar(
        x=list(range(1, len(ranks.cosine) + 1)), y=ranks.cosine.tolist(), marker={"color": LIGHT["accent"]},
        error_y={"array": (2 * ranks.cosine_error).tolist(), "color": LIGHT["muted"], "thickness": 1},
        hovertemplate="%{y:.3~f}",
    )  # fmt: skip
    note = "Cosine of a pair's gradient with that of all other prompts, by margin rank (1 is the widest)."
    return _chart(f"{key}-ranks", "Which candidates carry the gradient", note, [bars], "half")


def learning_charts(key: str, runs: Runs) -> list[Chart]:
    """Draw the held-out reward over every cost of an arm, as the mean over seeds and each seed faintly.

    The first chart has the legend of all.
    """
    order = sorted(runs, key=lambda arm: (arm != BASELINE, arm))
    charts = []
    for axis, label in _AXES.items():
        title = f"Held-out reward over {label}"
        traces = [
            trace for place, arm in enumerate(order) for trace in _arm_traces(place, arm, runs[arm], axis)
        ]
        if axis == "steps":
            note, size, legend = "Mean over seeds; single seeds are faint.", "wide", {}
        else:
            note, size, legend = "Lines as above.", "half", {"showlegend": False, "margin_t": 8}
        charts.append(_chart(f"{key}-{axis}", title, note, traces, size, hovermode="closest", **legend))
    return charts


def ratio_chart(key: str, compared: Sequence[Compared]) -> Chart | None:
    """Draw the ratios of steps and compute to the baseline's final score, with the fewest steps on top."""
    shown = [arm for arm in compared if arm.arm != BASELINE and arm.speedups]
    shown.sort(key=lambda arm: arm.speedups["steps"].ratio.value)
    if not shown:
        return None
    traces = [_ratio_trace(shown, axis, color, shift) for axis, color, shift in _RATIOS]
    note = "Factors by which the baseline needs more; 1 is the baseline, bars are 95% intervals."
    names = {"tickvals": list(range(len(shown))), "ticktext": [arm.arm for arm in shown]}
    line = {"type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1}
    return _chart(
        f"{key}-ratios", "To the baseline's final score", note, traces, "wide", hovermode="closest",
        yaxis=names, shapes=[line | {"line": {"color": LIGHT["muted"], "width": 1}}],
    )  # fmt: skip


_RATIOS: Final = (("steps", "high", 0.12), ("compute", "low", -0.12))


def _ratio_trace(shown: Sequence[Compared], axis: str, color: str, shift: float) -> go.Scatter:
    ratios = [arm.speedups[axis].ratio for arm in shown]
    return go.Scatter(
        x=[ratio.value for ratio in ratios], y=[place + shift for place in range(len(shown))], mode="markers",
        name=axis, marker={"color": LIGHT[color], "size": 9}, hovertemplate="%{x:.2f}",
        error_x={
            "symmetric": False, "color": LIGHT[color], "thickness": 1.5,
            "array": [_finite(ratio.high - ratio.value) for ratio in ratios],
            "arrayminus": [_finite(ratio.value - ratio.low) for ratio in ratios],
        },
    )  # fmt: skip


def _arm_traces(place: int, arm: str, seeds: Mapping[int, ArmRun], axis: str) -> list[go.Scatter]:
    color = LIGHT[_LINES[place % len(_LINES)]]
    style = {"color": color, "dash": _DASHES[place // len(_LINES) % len(_DASHES)]}
    curves = [(run.costs(axis), run.values("eval_reward")) for run in seeds.values()]
    count = min(len(costs) for costs, _ in curves)
    middle = [np.mean([values[:count] for values in column], axis=0) for column in zip(*curves, strict=True)]
    faint = [
        go.Scatter(
            x=costs.tolist(), y=scores.tolist(), mode="lines", line=style | {"width": 1}, opacity=0.3,
            legendgroup=arm, showlegend=False, hoverinfo="skip",
        )
        for costs, scores in curves
        if len(curves) > 1
    ]  # fmt: skip
    mean = go.Scatter(
        x=middle[0].tolist(), y=middle[1].tolist(), name=arm, legendgroup=arm, mode="lines",
        line=style | {"width": 2.2}, hovertemplate=f"{arm}: %{{y:.3f}} at %{{x:.4~s}}<extra></extra>",
    )  # fmt: skip
    return [*faint, mean]


def _whiskers(shown: Sequence[Any]) -> dict[str, Any]:
    return {
        "symmetric": False, "color": LIGHT["muted"], "thickness": 1,
        "array": [100 * (part.share_high - part.share) for part in shown],
        "arrayminus": [100 * (part.share - part.share_low) for part in shown],
    }  # fmt: skip


def _finite(value: float) -> float:
    return value if np.isfinite(value) else 0.0


def _chart(key: str, title: str, note: str, traces: Sequence[Any], size: str, **layout: Any) -> Chart:
    figure = go.Figure(traces)
    several = sum(trace.showlegend is not False for trace in traces) > 1
    figure.update_layout(LAYOUT, showlegend=several, margin_t=64 if several else 8)
    figure.update_xaxes(AXIS, ticks="outside", rangemode="tozero")
    figure.update_yaxes(AXIS, nticks=6)
    figure.update_layout(**layout)
    return Chart(key, title, note, str(figure.to_json()), size)
