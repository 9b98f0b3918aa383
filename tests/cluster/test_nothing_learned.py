"""Why steps taught nothing, in words."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.checks import RunStopped, check_margins
from cluster.nothing_learned import nothing_learned
from cluster.run_folder import RunFolder


def row(step: int, **values: float | None) -> dict[str, Any]:
    return {"step": step, "candidates": 8, "valid": 8, "zero_margin_groups": 0, "dropped_groups": 0, **values}


def test_the_reasons_are_counted_over_all_steps() -> None:
    rows = [
        {"step": 0, "eval_reward": 0.5},
        row(1, zero_margin_groups=2, tied_low=0.0, tied_high=1.0),
        row(2, zero_margin_groups=1, tied_low=0.25, tied_high=0.25, dropped_groups=1, valid=3),
        row(3, broken_images=4),
        row(4, skipped_updates=2, tied_low=None, tied_high=math.nan),
    ]  # fmt: skip
    ties, missing, broken, skipped = nothing_learned(rows, 2).split("; ", 3)
    assert ties.startswith("in 3 of 8 groups all candidates tied at a reward of 0 to 1 (raise selection.cand")
    assert missing.startswith("1 of 8 groups had fewer than two valid rewards, 27 of 32 candidates had one (")
    assert broken == "4 images were not finite (see nonfinite.jsonl)"
    assert skipped.startswith("2 updates were skipped, since their gradients were not finite (")


def test_there_may_have_been_no_step() -> None:
    assert nothing_learned([{"step": 0, "eval_reward": 0.5}], 8) == "no step was finished"


def give_up(configure: Any, folder: RunFolder, *steps: dict[str, Any]) -> str:
    """How a run of two groups per step ends when none of these steps had a margin."""
    settings = configure(groups_per_step=2, max_empty_batches=len(steps))
    folder.create(settings)
    run: Any = SimpleNamespace(settings=settings, folder=folder, empty_batches=0)
    folder.log(row(1, zero_margin_groups=2, tied_low=9.0, tied_high=9.0))  # before an update
    for metrics in steps[:-1]:
        run.empty_batches += 1
        check_margins(run, metrics)
        folder.log(metrics)
    run.empty_batches += 1
    with pytest.raises(RunStopped) as stopped:
        check_margins(run, steps[-1])
    return str(stopped.value)


def test_a_run_without_margins_says_how_many_groups_tied_at_what_and_what_to_raise(
    configure: Any, tmp_path: Path
) -> None:
    steps = [row(step, zero_margin_groups=2, tied_low=0.25, tied_high=0.25) for step in (2, 3, 4)]
    assert give_up(configure, RunFolder(tmp_path / "run"), *steps) == (
        "3 steps in a row had no group with a reward margin: in 6 of 6 groups all candidates tied at a "
        "reward of 0.25 (raise selection.candidates or rollout.noise_level, take harder prompts or a reward "
        "of finer grades)"
    )


def test_a_run_without_margins_says_how_many_rewards_were_invalid(configure: Any, tmp_path: Path) -> None:
    last = row(2, valid=1, dropped_groups=2, broken_images=3)
    assert give_up(configure, RunFolder(tmp_path / "run"), last).startswith(
        "1 steps in a row had no group with a reward margin: 2 of 2 groups had fewer than two valid rewards, "
        "1 of 8 candidates had one (see log.jsonl"
    )
