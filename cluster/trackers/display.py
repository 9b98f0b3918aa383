"""The printed progress of a run: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from cluster.record.names import STAGES

BAR: Final = 16
"""Columns of the bar."""
BESIDE: Final = len("training ") + BAR + len(" 1000/1000 ") + len("-:--:-- ")
"""Columns of the terminal beside a step's numbers."""
MEMORY: Final = 3600.0
"""Seconds of past steps from which the remaining time is estimated: a step of a large model takes minutes."""


class _Numbers(ProgressColumn):
    """The numbers of a step, the only column that is truncated in a narrow terminal."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Display:
    """The display of finished steps."""

    def __init__(self, console: Console, steps: int, start: int) -> None:
        """Show steps ``start`` to ``steps``."""
        self.console, self.steps = console, steps
        whole = Column(no_wrap=True)
        self.progress = Progress(
            TextColumn("[bold]training", table_column=whole),
            BarColumn(BAR, table_column=whole),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            _Numbers(),
            console=console,
            speed_estimate_period=MEMORY,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=steps, completed=start, note="")

    def __enter__(self) -> Display:
        """Start the live line."""
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the live line."""
        self.progress.stop()

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a step's metrics; step 0 is the evaluation before training."""
        for name, message in metrics.get("alarms", {}).items():
            self.console.print(f"step {metrics['step']}: guard: {name} {message}", highlight=False)
        if metrics["step"] == 0:
            self.console.print(f"start: held-out {describe_evaluation(metrics)}", highlight=False)
            return
        note = fitting(metrics, self.console.width - BESIDE)
        self.progress.update(self.task, completed=metrics["step"], note=note)
        if not self.console.is_terminal:
            self.console.print(
                f"step {metrics['step']}/{self.steps}  {describe(metrics)}", highlight=False, soft_wrap=True
            )
        elif "eval_reward" in metrics:
            self.console.print(f"step {metrics['step']}: held-out {describe_evaluation(metrics)}")


def describe(metrics: dict[str, Any]) -> str:
    """Describe a step in one line: reward, margin, seconds per stage, and its evaluation if it has one."""
    line = _numbers(metrics)
    return f"{line}  held-out {describe_evaluation(metrics)}" if "eval_reward" in metrics else line


def fitting(metrics: dict[str, Any], columns: int) -> str:
    """Describe a step in so many columns, with the seconds of all stages, of the longest, or of none."""
    brief = (
        f"reward {metrics['reward_mean']:.3f} margin {metrics['margin_mean']:.3f} "
        f"{metrics['seconds_step']:.1f} s"
    )
    longest = max(STAGES, key=lambda stage: metrics[f"seconds_{stage}"])
    lines = (_numbers(metrics), f"{brief} ({longest} {metrics[f'seconds_{longest}']:.1f})")
    return next((line for line in lines if len(line) <= columns), brief)


def _numbers(metrics: dict[str, Any]) -> str:
    seconds = " ".join(f"{stage} {metrics[f'seconds_{stage}']:.1f}" for stage in STAGES)
    return (
        f"reward {metrics['reward_mean']:.3f}  margin {metrics['margin_mean']:.3f}  "
        f"{metrics['seconds_step']:.1f} s ({seconds})"
    )


def describe_evaluation(metrics: dict[str, Any]) -> str:
    """Describe the evaluation of a step."""
    strict = f", strict {metrics['eval_strict']:.3f}" if "eval_strict" in metrics else ""
    return f"{metrics['eval_reward']:.3f}{strict}"
