"""A recorded run: its observers, and its return to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.config.preflight import Inputs
from cluster.config.settings import RunSettings
from cluster.loop.checks import Checks
from cluster.loop.drift_guard import DriftGuard, drift_guard_of
from cluster.loop.evaluation import Evaluation
from cluster.loop.observers import CheckpointWriter, Ledger, Metrics, Trackers
from cluster.loop.pictures import Pictures
from cluster.loop.production import consecutive
from cluster.loop.run import Run
from cluster.loop.stages import Stages
from cluster.record.checkpoints import Checkpoints, Saver
from cluster.record.held_out import held_out
from cluster.record.marker import Commit
from cluster.record.run_folder import RunFolder


class RestartableStages(Stages, Protocol):
    """Stages whose learner can be saved, restored and restarted."""

    @property
    def saver(self) -> Saver:
        """The learner, whose state is saved in checkpoints."""
        ...

    async def restart(self) -> None:
        """Restart all learner ranks, as at step 0, and forget all published weights."""
        ...


@dataclass(frozen=True, slots=True)
class Course:
    """A run with all that is restored when it continues from a checkpoint."""

    run: Run
    folder: RunFolder
    checkpoints: Checkpoints
    guard: DriftGuard
    stages: RestartableStages

    async def go_to(self, commit: Commit | None) -> int:
        """Restore the state after a checkpoint's step, or that of step 0, and return the step.

        Later records are removed from the run folder, and the drift guard is rebuilt from the others.
        """
        self.checkpoints.pending = None
        if commit:
            self.checkpoints.rewind(commit, self.folder)
            await self.checkpoints.restore(commit.step, self.stages.saver)
        else:
            self.folder.rewind(-1)
        self.run.empty_batches = commit.empty_batches if commit else 0
        self.guard.rebuild(self.folder.history())
        return commit.step if commit else 0


def course_of(
    settings: RunSettings,
    inputs: Inputs,
    folder: RunFolder,
    checkpoints: Checkpoints,
    stages: RestartableStages,
    trackers: Sequence[Callable[[dict[str, Any]], None]],
) -> Course:
    """Assemble a run, with its observers in the order in which they are called after a step."""
    guard = drift_guard_of(settings)
    observers = (
        Checks(folder),
        Ledger(folder),
        Pictures(folder),
        Metrics(),
        Evaluation(folder, held_out(inputs.held_out, settings)),
        guard,
        Trackers(trackers),
        CheckpointWriter(checkpoints, stages.saver),
    )
    run = Run(settings, inputs.train, stages, consecutive(settings), observers)
    return Course(run, folder, checkpoints, guard, stages)
