"""The report's section of pairs: the widest margins of the first, middle and last recorded steps.

The two images of a pair share prompt, weights and step, and differ only in their noise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pvariance
from typing import Final

from cluster.record.json_lines import Row
from cluster.record.names import IMAGES, LEDGER
from cluster.record.run_data import RecordedRun, number, read_table, stepped
from cluster.report.thumbnails import Picture, picture

PAIRS_PER_STEP: Final = 4
_BINS: Final = 28
_STRIP: Final = (280, 46)  # the drawing's width and height in its own units


@dataclass(frozen=True, slots=True)
class Shot:
    """One candidate on the page."""

    picture: Picture
    row: Row


@dataclass(frozen=True, slots=True)
class Dot:
    """The mark of one candidate on its group's strip; the role is `low`, `high`, `kept` or `left`."""

    x: float
    y: float
    role: str


@dataclass(frozen=True, slots=True)
class Pair:
    """The candidates of lowest and highest reward among a group's saved images, and all its dots."""

    prompt: str
    group: int
    low: Shot
    high: Shot
    dots: tuple[Dot, ...]
    bounds: tuple[float, float]

    @property
    def view(self) -> str:
        """The part of the strip with dots, as an SVG view box."""
        top = min(dot.y for dot in self.dots) - 5
        return f"0 {top:g} {_STRIP[0]} {_STRIP[1] - top:g}"

    @property
    def margin(self) -> float:
        """The distance of the two rewards."""
        return float(self.high.row["reward"] - self.low.row["reward"])


@dataclass(frozen=True, slots=True)
class Moment:
    """One recorded step: its widest pairs, and statistics of its ledger."""

    step: int
    pairs: tuple[Pair, ...]
    groups: int
    pictured: int
    policy_version: int | None
    within: float | None  # share of the variance of rewards that lies within prompts


def noise_section(run: RecordedRun) -> tuple[list[Moment], list[str]]:
    """Choose the moments to show, with notes on missing data."""
    folders = stepped(run.folder / IMAGES, "step-*")
    ledgers = stepped(run.folder / LEDGER, "step-*.parquet")
    pictured = [step for step, folder in folders.items() if any(folder.glob("g*.png"))]
    if not pictured:
        return [], ["No images of training steps were saved, so no pair of candidates can be shown."]
    moments, notes = [], []
    for step in spread(pictured):
        rows = read_table(ledgers[step]) if step in ledgers else None
        moment = _moment(step, rows, folders[step]) if rows else None
        if moment is None:
            problem = "no pair with rewards" if rows else "no readable ledger"
            notes.append(f"Step {step} has images but {problem}, so its pairs are not shown.")
        else:
            moments.append(moment)
    return moments, notes


def spread(steps: Sequence[int]) -> list[int]:
    """Choose the first, the middle and the last of the steps, or all if there are fewer."""
    first, last = min(steps), max(steps)
    middle = min(steps, key=lambda step: (abs(step - (first + last) / 2), step))
    return sorted({first, middle, last})


def _moment(step: int, rows: Sequence[Row], folder: Path) -> Moment | None:
    groups = _by_group(rows)
    files = _files(folder)
    bounds = _bounds(rows)
    pairs = [pair for group, members in groups.items() if (pair := _pair(group, members, files, bounds))]
    if not pairs:
        return None
    widest = sorted(pairs, key=lambda pair: (-pair.margin, pair.group))[:PAIRS_PER_STEP]
    version = number(rows[0], "policy_version")
    return Moment(
        step=step,
        pairs=tuple(widest),
        groups=len(groups),
        pictured=len(pairs),
        policy_version=None if version is None else int(version),
        within=within_share(groups),
    )


def _by_group(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Group the candidates that have a reward."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        if row.get("valid", True) and number(row, "reward") is not None:
            groups.setdefault(int(row["group"]), []).append(row)
    return groups


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    matches = ((path, re.fullmatch(r"g(\d+)-c(\d+)\.png", path.name)) for path in folder.iterdir())
    return {(int(match[1]), int(match[2])): path for path, match in matches if match}


def _pair(
    group: int, members: list[Row], files: Mapping[tuple[int, int], Path], bounds: tuple[float, float]
) -> Pair | None:
    shown = [row for row in members if (group, int(row["candidate"])) in files]
    shown.sort(key=lambda row: (row["reward"], row["candidate"]))
    if len(shown) < 2:
        return None
    low, high = shown[0], shown[-1]
    pictures = [picture(files[group, int(row["candidate"])]) for row in (low, high)]
    if pictures[0] is None or pictures[1] is None:
        return None
    dots = _dots(members, low, high, bounds)
    return Pair(str(low["prompt"]), group, Shot(pictures[0], low), Shot(pictures[1], high), dots, bounds)


def _bounds(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the range of the reward axis: [0, 1] if it contains the rewards, else their own range."""
    rewards = [value for row in rows if (value := number(row, "reward")) is not None]
    low, high = min(rewards, default=0.0), max(rewards, default=1.0)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, max(high, low + 1e-9)


def _dots(members: list[Row], low: Row, high: Row, bounds: tuple[float, float]) -> tuple[Dot, ...]:
    """Stack candidates of about the same reward, the kept ones at the bottom."""
    stacks: dict[int, list[str]] = {}
    for row in members:
        place = round((row["reward"] - bounds[0]) / (bounds[1] - bounds[0]) * _BINS)
        role = "low" if row is low else "high" if row is high else "kept" if row.get("selected") else "left"
        stacks.setdefault(place, []).append(role)
    width, height = _STRIP
    tallest = max(len(stack) for stack in stacks.values())
    rise = min(8.0, (height - 10) / max(tallest - 1, 1))
    order = ("low", "high", "kept", "left")
    return tuple(
        Dot(round(6 + place / _BINS * (width - 12), 1), round(height - 5 - level * rise, 1), role)
        for place, stack in stacks.items()
        for level, role in enumerate(sorted(stack, key=order.index))
    )


def within_share(groups: Mapping[int, Sequence[Row]]) -> float | None:
    """Return the share of the variance of all rewards within prompts, where only the noise differs."""
    rewards = [[float(row["reward"]) for row in members] for members in groups.values()]
    everything = pvariance([reward for members in rewards for reward in members]) if rewards else 0.0
    if not everything:
        return None
    count = sum(len(members) for members in rewards)
    return fmean([pvariance(members) for members in rewards], [len(m) / count for m in rewards]) / everything
