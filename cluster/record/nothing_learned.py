"""Explain a run without an update: its causes, from the metrics, and their remedies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from cluster.record.json_lines import Row
from cluster.record.nonfinite import BROKEN
from cluster.record.run_data import series, total

SHOWN: Final = 3


def nothing_learned(rows: Sequence[Row], groups: int) -> str:
    """Explain from their metrics why steps of ``groups`` groups each had no update; step 0 only evaluates."""
    steps = [row for row in rows if row["step"] > 0]
    return "; ".join(_reasons(steps, len(steps) * groups)) or "no step was finished"


def _reasons(rows: Sequence[Row], groups: int) -> Iterator[str]:
    if tied := total(rows, "zero_margin_groups"):
        yield (
            f"in {tied:.0f} of {groups} groups all candidates tied{_at(rows)} (raise selection.candidates or "
            "rollout.noise_level, take harder prompts or a reward of finer grades)"
        )
    if dropped := total(rows, "dropped_groups"):
        sampled, valid = total(rows, "candidates"), total(rows, "valid")
        yield (
            f"{dropped:.0f} of {groups} groups had fewer than two valid rewards, {valid:.0f} of "
            f"{sampled:.0f} candidates had one (see log.jsonl, and try the rewards with "
            "python -m rewards.check)"
        )
    if broken := total(rows, BROKEN):
        yield f"{broken:.0f} images were not finite (see nonfinite.jsonl)"
    if skipped := total(rows, "skipped_updates"):
        yield (
            f"{skipped:.0f} updates were skipped, since their gradients were not finite "
            "(see nonfinite.jsonl; lower learner.learning_rate)"
        )


def _at(rows: Sequence[Row]) -> str:
    """Describe the rewards at which groups tied: one value, or the lowest and the highest."""
    low, high = series(rows, "tied_low")[1], series(rows, "tied_high")[1]
    if not low:
        return ""
    ends = dict.fromkeys(f"{end:.4g}" for end in (min(low), max(high)))
    return f" at a reward of {' to '.join(ends)}"


def first_few(names: Sequence[str]) -> str:
    """List the first few names and the number of the others."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
