"""The lines that a run prints."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from cluster.trackers.display import Display, describe
from tests.support.step_metrics import EVALUATED, METRICS


def test_a_step_is_one_line_with_its_seconds() -> None:
    assert describe(METRICS) == (
        "reward 0.512  margin 0.250  3.2 s (sample 1.0 score 0.5 select 0.0 learn 1.6 broadcast 0.1)"
    )
    assert describe(EVALUATED).endswith("held-out 0.750, strict 0.500")
    assert describe({**METRICS, "eval_reward": 0.75}).endswith("held-out 0.750")


def shown(*lines: dict[str, Any], terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=150, color_system=None)
    with Display(console, steps=9, start=0) as display:
        for line in lines:
            display.step(line)
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    output = shown({"step": 0, "eval_reward": 0.25}, METRICS, terminal=False)
    assert output.splitlines() == ["start: held-out 0.250", f"step 4/9  {describe(METRICS)}"]


def test_a_live_line_in_a_terminal() -> None:
    output = shown({"step": 0, "eval_reward": 0.25}, EVALUATED, terminal=True)
    assert "4/9" in output
    assert "reward 0.512  margin 0.250" in output
    assert "step 4: held-out 0.750, strict 0.500" in output


def test_a_step_without_a_valid_reward_can_be_shown() -> None:
    assert "reward nan" in describe({**METRICS, "reward_mean": float("nan")})
