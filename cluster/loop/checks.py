"""Stop a run that cannot continue: by its images, rewards, margins, weights or gradients."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config.errors import RunStopped
from cluster.loop.run import Run, Step
from cluster.record.events import warn
from cluster.record.nonfinite import BROKEN
from cluster.record.nothing_learned import first_few, nothing_learned
from cluster.record.run_folder import RunFolder
from learner.objectives.registry import load_objective
from learner.records import Update


@dataclass(frozen=True, slots=True)
class Checks:
    """An observer that records values that are not finite, and stops runs that cannot learn."""

    folder: RunFolder

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Check a step.

        Raises:
            RunStopped: with the defect, the file of its evidence and a remedy.
        """
        if made is None:
            return
        broken = [image for produced in made.batch for image in produced.broken]
        await asyncio.to_thread(self.folder.record_broken, step, broken)
        self._images(made)
        _rewards(run, made)
        if made.update is None:
            self._margins(run, {"step": step, **made.selection.metrics, BROKEN: len(broken)})
            return
        _weights(run, made.update)
        await self._gradients(run, step, made, made.update)
        _healthy(run, step, made, made.update.metrics)

    def _images(self, made: Step) -> None:
        """Stop if no candidate is finite; those excluded by their drafts do not count."""
        count = sum(len(group.noises) for group in made.groups)
        if sum("candidate" in image for produced in made.batch for image in produced.broken) == count:
            raise RunStopped(
                f"none of the step's {count} images is finite, so none can be scored; "
                f"their seeds are in {self.folder.nonfinite}"
            )

    def _margins(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """Stop after too many steps without a margin; ``metrics`` are those of the last one."""
        count = run.empty_batches
        if count >= run.settings.max_empty_batches:
            rows = [*self.folder.history(), metrics][-count:]
            reason = nothing_learned(rows, run.settings.groups_per_step)
            raise RunStopped(f"{count} steps in a row had no group with a reward margin: {reason}")

    async def _gradients(self, run: Run, step: int, made: Step, update: Update) -> None:
        """Record the cause of a skipped update, and stop after too many in a row."""
        if not update.metrics["skipped_updates"]:
            return
        suspects = [made.selection.kept[number] for number in update.suspects]
        await asyncio.to_thread(self.folder.record_nonfinite, step, made.groups, suspects)
        if update.metrics["skipped_in_a_row"] >= run.settings.learner.max_skipped:
            raise RunStopped(
                f"{update.metrics['skipped_in_a_row']:.0f} optimizer steps in a row had a gradient that is "
                f"not finite; its cause is in {self.folder.nonfinite}"
            )


def _rewards(run: Run, made: Step) -> None:
    if made.selection.metrics["valid"] == 0 and run.stages.failures:
        raise RunStopped("; ".join(run.stages.failures))


def _weights(run: Run, update: Update) -> None:
    """Stop if weights are not finite, which no later update can repair."""
    if update.broken:
        rate = update.metrics["learning_rate"]
        raise RunStopped(
            f"after {run.updates} optimizer steps, the last with a learning rate of {rate:g}, the weights "
            f"are no longer finite: {first_few(update.broken)}; "
            "try a lower learner.learning_rate or a warm-up"
        )


def _healthy(run: Run, step: int, made: Step, metrics: Mapping[str, float]) -> None:
    """Stop at metrics that the objective knows to be a defect, and log those that it doubts."""
    objective, dtype = load_objective(run.settings.learner.objective), run.settings.model.dtype
    on_policy = step - 1 == min(group.version for group in made.groups)
    if defect := objective.healthy(metrics, on_policy=on_policy, dtype=dtype):
        raise RunStopped(defect)
    if doubt := objective.doubts(metrics, on_policy=on_policy):
        warn("objective in doubt", story=doubt)
