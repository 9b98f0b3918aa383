"""Render the report of a run, ``report.html``, from the files of its folder alone.

The page is a single file that opens offline, with Plotly, styles and images inside. Its size is bounded:
Plotly's 5 MB, at most 56 images of at most 48 KB each, and the numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.record.files import write_text
from cluster.record.json_lines import Row
from cluster.record.names import REPORT
from cluster.record.run_data import RecordedRun, load_run, number
from cluster.report.charts import DARK, LIGHT, diagnostic_charts, learning_charts, time_chart
from cluster.report.drift import guard_chart
from cluster.report.held_out import held_out_section
from cluster.report.html import assets, environment, script_json
from cluster.report.numbers import MISSING, duration, show
from cluster.report.pairs import noise_section
from cluster.report.summary import changes, headline, stage_costs
from cluster.report.thumbnails import THUMBNAIL


def write_report(folder: Path) -> Path:
    """Write the report of a run folder and return its path.

    Raises:
        NotARunError: if it is not the folder of a run.
    """
    return write_text(folder / REPORT, _render(load_run(folder)))


def _render(run: RecordedRun) -> str:
    moments, noise_notes = noise_section(run)
    held_out, held_out_notes = held_out_section(run)
    charts = [*learning_charts(run), time_chart(run), guard_chart(run), *diagnostic_charts(run)]
    drawn = [chart for chart in charts if chart]
    template = environment().get_template("report.html.j2")
    return template.render(
        run=run,
        head=headline(run),
        notes=[*run.notes, *noise_notes, *held_out_notes],
        moments=moments,
        held_out=held_out,
        learning=[c for c in drawn if c.size in ("wide", "half") and c.key not in ("time", "guard")],
        time=next((chart for chart in drawn if chart.key == "time"), None),
        guard=next((chart for chart in drawn if chart.key == "guard"), None),
        alarms=[(row["step"], *alarm) for row in run.metrics for alarm in _alarms(row)],
        diagnostics=[chart for chart in drawn if chart.size == "small"],
        costs=stage_costs(run) if run.training else [],
        saved=_saved(run),
        changes=changes(run),
        config=_config_sections(run.config),
        last=_last_metrics(run),
        palettes={"light": LIGHT, "dark": DARK},
        figures=script_json({chart.key: json.loads(chart.figure) for chart in drawn}),
        colors=script_json({LIGHT[name]: DARK[name] for name in LIGHT}),
        assets=assets(),
        thumbnail=THUMBNAIL,
    )


def _alarms(row: Row) -> list[tuple[str, str]]:
    """List the drift guard's alarms of a step, as metrics and messages."""
    alarms = row.get("alarms")
    return [(str(name), str(text)) for name, text in alarms.items()] if isinstance(alarms, dict) else []


def _saved(run: RecordedRun) -> str | None:
    """Estimate from the measured time per candidate the extra cost of training on every sampled candidate."""
    sampled, _, _, trained, _ = stage_costs(run)
    if not run.training or not sampled.candidates or not trained.candidates:
        return None
    extra = trained.seconds / trained.candidates * (sampled.candidates - trained.candidates)
    return duration(extra) if extra > 0 else None


def _config_sections(config: Row) -> list[tuple[str, list[tuple[str, str]]]]:
    """List the configuration in titled sections: the top level, each table, each table of an array."""
    top = [(key, _value(value)) for key, value in config.items() if not _tables(value)]
    sections = [
        (f"{key} {place}" if len(tables) > 1 else key, [(name, _value(item)) for name, item in table.items()])
        for key, value in config.items()
        for tables in [_tables(value)]
        for place, table in enumerate(tables, start=1)
    ]
    return [("run", top), *sections] if top else sections


def _tables(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else []


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _last_metrics(run: RecordedRun) -> list[tuple[str, str, str]]:
    """List every metric of the first and the last training step."""
    if not run.metrics:
        return []
    first, last = (run.training or run.metrics)[0], (run.training or run.metrics)[-1]
    keys = [key for key in dict.fromkeys([*first, *last]) if key != "alarms"]
    return [(key, _metric(first, key), _metric(last, key)) for key in keys]


def _metric(row: Row, key: str) -> str:
    value = number(row, key)
    if value is None:
        return MISSING
    return show(int(value)) if isinstance(row[key], int) else show(value)
