"""The report's section of held-out images before and after training, on the same noise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.record.json_lines import Row
from cluster.record.names import EVAL, IMAGES
from cluster.record.run_data import RecordedRun, number, read_table, stepped
from cluster.report.thumbnails import Picture, picture

CARDS: Final = 16
_EQUAL: Final = 1e-6  # rewards closer than this count as the same
_Key = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One held-out prompt and noise; `after` is None if there was only one evaluation."""

    prompt: str
    index: int
    sample: int
    noise_seed: object
    before: Picture
    after: Picture | None
    rewards: tuple[float | None, ...]
    strict: tuple[float | None, ...]

    @property
    def change(self) -> str | None:
        """The change of the reward: `improved`, `worse`, `same`, or None without two rewards."""
        return direction(*self.rewards) if len(self.rewards) == 2 else None


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The first and the last evaluation, a selection of their images, and a count over all of them."""

    first: int
    last: int | None
    cards: tuple[Card, ...]
    tally: dict[str, int]

    @property
    def compared(self) -> int:
        """The number of images that have a reward before and after."""
        return sum(self.tally.values())


def held_out_section(run: RecordedRun) -> tuple[HeldOut | None, list[str]]:
    """Compare the first and the last evaluation, with notes on missing data."""
    tables = {}
    damaged = []
    for step, path in stepped(run.folder / EVAL, "step-*.parquet").items():
        rows = read_table(path)
        if rows:
            tables[step] = {(int(row["prompt_index"]), int(row["sample"])): row for row in rows}
        else:
            damaged.append(f"The table of the evaluation at step {step} could not be read.")
    if not tables:
        return None, [*damaged, "No table of held-out images was recorded."]
    first, last = min(tables), max(tables)
    steps = (first,) if first == last else (first, last)
    cards = _cards(run.folder, steps, [tables[step] for step in steps])
    notes = [] if cards else ["The held-out images of the evaluations were not saved."]
    if _reseeded(tables[first], tables[last]):
        notes.append("The evaluations used different noise, so before and after are not the same images.")
    tally = _tally(tables[first], tables[last]) if len(steps) == 2 else {}
    return HeldOut(first, steps[1] if len(steps) == 2 else None, cards, tally), [*damaged, *notes]


def direction(before: float | None, after: float | None) -> str | None:
    """Return `improved`, `worse` or `same` for a change of a reward; None if one of the two is missing."""
    if before is None or after is None:
        return None
    if abs(after - before) <= _EQUAL:
        return "same"
    return "improved" if after > before else "worse"


def evenly(keys: Sequence[_Key], count: int) -> list[_Key]:
    """Choose keys spread evenly over the prompts, one noise per prompt if these are enough."""
    ordered = sorted(keys, key=lambda key: (key[1], key[0]))
    first = [key for key in ordered if key[1] == ordered[0][1]]
    pool = first if len(first) >= count else ordered
    if len(pool) <= count:
        return sorted(pool)
    return sorted(pool[round(i * (len(pool) - 1) / (count - 1))] for i in range(count))


def _cards(folder: Path, steps: Sequence[int], tables: Sequence[dict[_Key, Row]]) -> tuple[Card, ...]:
    files = [_files(folder / IMAGES / f"eval-{step:06d}") for step in steps]
    shared = set[_Key].intersection(*(set(paths) for paths in files), *(set(table) for table in tables))
    cards = (
        _card(key, [paths[key] for paths in files], [table[key] for table in tables])
        for key in evenly(list(shared), CARDS)
    )
    return tuple(card for card in cards if card)


def _card(key: _Key, paths: Sequence[Path], rows: Sequence[Row]) -> Card | None:
    pictures = [picture(path) for path in paths]
    before = pictures[0]
    if before is None or None in pictures:
        return None
    return Card(
        prompt=str(rows[0]["prompt"]),
        index=key[0],
        sample=key[1],
        noise_seed=rows[0].get("noise_seed"),
        before=before,
        after=pictures[1] if len(pictures) == 2 else None,
        rewards=tuple(number(row, "reward") for row in rows),
        strict=tuple(number(row, "strict") for row in rows),
    )


def _files(folder: Path) -> dict[_Key, Path]:
    matches = ((path, re.fullmatch(r"p(\d+)-s(\d+)\.png", path.name)) for path in folder.glob("p*.png"))
    return {(int(match[1]), int(match[2])): path for path, match in matches if match}


def _reseeded(first: dict[_Key, Row], last: dict[_Key, Row]) -> bool:
    shared = first.keys() & last.keys()
    return any(first[key].get("noise_seed") != last[key].get("noise_seed") for key in shared)


def _tally(first: dict[_Key, Row], last: dict[_Key, Row]) -> dict[str, int]:
    counts = {"improved": 0, "same": 0, "worse": 0}
    for key in first.keys() & last.keys():
        result = direction(number(first[key], "reward"), number(last[key], "reward"))
        if result:
            counts[result] += 1
    return counts
