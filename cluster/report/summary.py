"""The summary of a run: headline, tiles, changes of metrics, and the cost of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import fmean
from typing import Any, Final

from cluster.record.json_lines import Row
from cluster.record.names import STAGES
from cluster.record.nothing_learned import nothing_learned
from cluster.record.run_data import RecordedRun, evaluated, number, series, total
from cluster.report.numbers import MISSING, change, duration, show

_FEW: Final = 3  # steps over which a noisy training metric is averaged at both ends
_NAMES: Final = {
    "eval_reward": "held-out reward",
    "eval_strict": "held-out strict",
    "eval_win_rate": "preferred to the start",
    "reward_mean": "training reward",
    "margin_mean": "reward margin",
}


@dataclass(frozen=True, slots=True)
class Change:
    """A metric at the start and at the end of a run."""

    key: str
    start: float
    end: float | None

    @property
    def name(self) -> str:
        """The name of the metric for readers."""
        return _NAMES.get(self.key) or f"held-out {self.key.removeprefix('eval_')}"

    @property
    def cells(self) -> tuple[str, str, str]:
        """Start, end and difference as text."""
        if self.end is None:
            return show(self.start), MISSING, MISSING
        return show(self.start), show(self.end), change(self.start, self.end)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """The work and time of a stage in the whole run; broadcast has no candidates."""

    name: str
    did: str
    candidates: int | None
    seconds: float
    share: float
    per_step: float

    @property
    def per_candidate(self) -> str:
        """The time of the stage per candidate."""
        return duration(self.seconds / self.candidates) if self.candidates else MISSING


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One large number in the page's header."""

    label: str
    value: str
    start: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The page's header: the run's configuration and its outcome."""

    task: str
    facts: tuple[tuple[str, str], ...]
    outcome: str
    tiles: tuple[Tile, ...]


def changes(run: RecordedRun) -> list[Change]:
    """Compute start and end of every evaluated reward, then of the training reward and the margin."""
    keys = evaluated(run.evaluations)
    keys.sort(key=lambda key: (key not in _NAMES, list(_NAMES).index(key) if key in _NAMES else 0))
    held_out = [_ends(run.metrics, key, few=1) for key in keys]
    trained = [_ends(run.training, key, few=_FEW) for key in ("reward_mean", "margin_mean")]
    return [item for item in (*held_out, *trained) if item]


def stage_costs(run: RecordedRun) -> list[StageCost]:
    """Sum candidates and seconds of every stage over the whole run."""
    rows = run.training
    trained = [row for row in rows if number(row, "loss") is not None]
    counts = (
        ("sampled", total(rows, "candidates")),
        ("scored", total(rows, "valid")),
        ("selected", total(rows, "selected")),
        ("trained", total(trained, "selected")),
        ("weights sent", None),
    )
    seconds = [total(rows, f"seconds_{stage}") for stage in STAGES]
    everything = sum(seconds) or 1.0
    return [
        StageCost(
            name=stage,
            did=did,
            candidates=None if count is None else int(count),
            seconds=spent,
            share=spent / everything,
            per_step=spent / max(len(rows), 1),
        )
        for stage, (did, count), spent in zip(STAGES, counts, seconds, strict=True)
    ]


def headline(run: RecordedRun) -> Headline:
    """Compile the page's header."""
    selection = run.section("selection")
    facts = {
        "model": _model(run.section("model")),
        "strategy": str(selection.get("strategy", "")).replace("_", " "),
        "candidates": _budget(selection),
        "trained": _trained_share(run),
        "steps": steps_of(run),
        "rewards": ", ".join(_reward_names(run)),
        "seed": str(run.config.get("seed", "")),
    }
    return Headline(
        task=str(run.config.get("preset") or run.folder.resolve().name),
        facts=tuple((name, value) for name, value in facts.items() if value),
        outcome=_outcome(run),
        tiles=tuple(_tiles(run)),
    )


def _trained_share(run: RecordedRun) -> str:
    """Return how much of a step's budget was trained, since ties leave some of it unspent; "" if unknown."""
    selection, groups = run.section("selection"), run.config.get("groups_per_step")
    kept = selection.get("candidates" if selection.get("strategy") == "all" else "keep")
    if not (run.training and groups and kept):
        return ""
    most = groups * kept
    return f"{total(run.training, 'selected') / (most * len(run.training)):.0%} of at most {most} per step"


def _ends(rows: Sequence[Row], key: str, few: int) -> Change | None:
    """Average the first and the last few values, which do not overlap even in a short run."""
    values = series(rows, key)[1]
    if not values:
        return None
    if len(values) == 1:
        return Change(key, values[0], None)
    width = min(few, len(values) // 2)
    return Change(key, fmean(values[:width]), fmean(values[-width:]))


def _model(section: Row) -> str:
    path = section.get("path") or section.get("name") or ""
    return PurePath(str(path)).name


def _budget(selection: Row) -> str:
    candidates, keep = selection.get("candidates"), selection.get("keep")
    if candidates is None:
        return ""
    return f"{candidates} per prompt" if keep is None else f"{candidates} \u2192 {keep} kept"


def steps_of(run: RecordedRun) -> str:
    """Return the steps of a run, of those planned if it ended early."""
    if run.planned and run.last_step < run.planned:
        return f"{run.last_step} of {run.planned}"
    return str(run.last_step or "")


def _reward_names(run: RecordedRun) -> list[str]:
    rewards: Any = run.config.get("rewards", [])
    return [str(item["name"]) for item in rewards if isinstance(item, dict) and "name" in item]


def _outcome(run: RecordedRun) -> str:
    if run.learned_nothing:
        reason = nothing_learned(run.training, int(run.config.get("groups_per_step", 0)))
        return f"Nothing was learned, since no update was applied in {len(run.training)} steps: {reason}."
    reward = _ends(run.metrics, "eval_reward", few=1)
    if reward is None or reward.end is None:
        return "There is no pair of evaluations to compare." if run.training else "No step was finished."
    verb = "rose" if reward.end > reward.start else "fell" if reward.end < reward.start else "stayed"
    if verb == "stayed":
        return f"The held-out reward stayed at {show(reward.end)}."
    return f"The held-out reward {verb} from {show(reward.start)} to {show(reward.end)}."


def _tiles(run: RecordedRun) -> list[Tile]:
    tiles = [
        Tile(label=label, value=show(item.start if item.end is None else item.end), **_from(item))
        for key, label in (("eval_reward", "Held-out reward"), ("eval_strict", "Held-out strict"))
        if (item := _ends(run.metrics, key, few=1))
    ]
    won = _ends(run.metrics, "eval_win_rate", few=1)
    # A reward without a strict score has no natural scale, so the share of wins is clearer.
    if won and won.end is not None and len(tiles) == 1:
        tiles.append(
            Tile(label="Preferred to the start", value=f"{won.end:.0%}", note="same prompts and noise")
        )
    return [*tiles, *_cost_tiles(run)] if run.training else tiles


def _from(item: Change) -> dict[str, str]:
    if item.end is None:
        return {"note": "one evaluation only"}
    return {"start": show(item.start), "note": f"{change(item.start, item.end)} in this run"}


def _cost_tiles(run: RecordedRun) -> list[Tile]:
    seconds, evaluation = total(run.training, "seconds_step"), total(run.metrics, "seconds_eval")
    sampled, scored, _, trained, _ = (cost.candidates or 0 for cost in stage_costs(run))
    steps = len(run.training)
    valid = "all with valid rewards" if scored == sampled else f"{show(scored)} with valid rewards"
    ratio = f"1 in {sampled / trained:.1f} sampled".replace(".0 ", " ") if trained else ""
    return [
        Tile(
            label="Time in training",
            value=duration(seconds),
            note=f"and {duration(evaluation)} in evaluation" if evaluation else "",
        ),
        Tile(label="Per step", value=duration(seconds / steps), note=f"mean of {steps}"),
        Tile(label="Images sampled", value=show(sampled), note=valid),
        Tile(label="Images trained on", value=show(trained), note=ratio),
    ]
