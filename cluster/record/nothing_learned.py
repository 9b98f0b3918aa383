"""Why some steps taught nothing, and what to raise: a run that learns nothing must say so in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from cluster.record.nonfinite import BROKEN
from cluster.record.run_data import Row, series, total

SHOWN: Final = 3


def nothing_learned(rows: Sequence[Row], groups: int) -> str:
    """What kept steps of so many ``groups`` from an update, by their metrics; step 0 only evaluates."""
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
    """The rewards at which groups tied: one, or from the lowest to the highest."""
    low, high = series(rows, "tied_low")[1], series(rows, "tied_high")[1]
    if not low:
        return ""
    ends = dict.fromkeys(f"{end:.4g}" for end in (min(low), max(high)))
    return f" at a reward of {' to '.join(ends)}"


def some(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
