"""The observers that record a step: metrics, ledger, trackers and checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.loop.drift_guard import image_metrics
from cluster.loop.run import Run, Step
from cluster.record.checkpoints import Checkpoints, Saver
from cluster.record.nonfinite import BROKEN
from cluster.record.run_folder import RunFolder
from learner.objectives.registry import load_objective, metric_names


class Metrics:
    """An observer that adds the metrics of the step itself."""

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Add the metrics of selection and update, counts, and the seconds of every stage."""
        if made is None:
            return
        metrics |= {
            "policy_version": step - 1,
            "staleness": step - 1 - min(group.version for group in made.groups),
            **made.selection.metrics,
            BROKEN: sum(len(produced.broken) for produced in made.batch),
            **(made.update.metrics if made.update else _unknown(run)),
            "updates": run.updates,
            **image_metrics([produced.observed for produced in made.batch]),
            **run.watch.seconds(made.batch),
            **run.stages.status,
        }


def _unknown(run: Run) -> dict[str, None]:
    """The metrics of an update, without their values: nothing was kept to train on."""
    return dict.fromkeys(metric_names(load_objective(run.settings.learner.objective)))


@dataclass(frozen=True, slots=True)
class Ledger:
    """An observer that records every candidate of a step."""

    folder: RunFolder

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Write the step's rows."""
        if made is not None:
            scores = [produced.scores for produced in made.batch]
            await asyncio.to_thread(self.folder.record, step, made.groups, scores, made.selection)


@dataclass(frozen=True, slots=True)
class Trackers:
    """An observer that passes a step's metrics to the trackers."""

    trackers: Sequence[Callable[[dict[str, Any]], None]]

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Call every tracker, in order."""
        for tracker in self.trackers:
            tracker(metrics)


@dataclass(frozen=True, slots=True)
class CheckpointWriter:
    """An observer that commits checkpoints regularly, after the last step and at a stop."""

    checkpoints: Checkpoints
    saver: Saver

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Save a checkpoint if it is due, and settle the one before."""
        if made is None:
            return
        if run.ends(step) or step % run.settings.checkpoint_every == 0:
            await self.checkpoints.commit(step, self.saver, empty_batches=run.empty_batches)
        await self.checkpoints.settle(self.saver, wait=run.ends(step))
