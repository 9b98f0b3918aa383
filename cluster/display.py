"""What a run prints: a live progress line in a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

STAGES = ("sample", "score", "select", "learn", "broadcast")


class Display:
    """Shows steps as they end."""

    def __init__(self, console: Console, steps: int, start: int) -> None:
        """Show steps ``start`` to ``steps``."""
        self.console, self.steps = console, steps
        self.progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
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
        for name, story in metrics.get("alarms", {}).items():
            self.console.print(f"step {metrics['step']}: guard: {name} {story}", highlight=False)
        if metrics["step"] == 0:
            self.console.print(f"start: held-out {describe_evaluation(metrics)}", highlight=False)
            return
        note = describe(metrics)
        self.progress.update(self.task, completed=metrics["step"], note=note)
        if not self.console.is_terminal:
            self.console.print(
                f"step {metrics['step']}/{self.steps}  {note}", highlight=False, soft_wrap=True
            )
        elif "eval_reward" in metrics:
            self.console.print(f"step {metrics['step']}: held-out {describe_evaluation(metrics)}")


def describe(metrics: dict[str, Any]) -> str:
    """One step in a line: reward, margin, seconds per stage, and the evaluation where there is one."""
    seconds = " ".join(f"{stage} {metrics[f'seconds_{stage}']:.1f}" for stage in STAGES)
    line = (
        f"reward {metrics['reward_mean']:.3f}  margin {metrics['margin_mean']:.3f}  "
        f"{metrics['seconds_step']:.1f} s ({seconds})"
    )
    return f"{line}  held-out {describe_evaluation(metrics)}" if "eval_reward" in metrics else line


def describe_evaluation(metrics: dict[str, Any]) -> str:
    """The evaluation in a few words."""
    strict = f", strict {metrics['eval_strict']:.3f}" if "eval_strict" in metrics else ""
    return f"{metrics['eval_reward']:.3f}{strict}"
