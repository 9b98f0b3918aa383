"""The course of a run that is recorded: its observers, and its way back to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.config.preflight import Inputs
from cluster.config.settings import RunSettings
from cluster.loop.checks import Checks
from cluster.loop.drift_guard import DriftGuard, guard_of
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
    """Stages whose learner has a state that can be saved, and can start anew."""

    @property
    def saver(self) -> Saver:
        """The learner, as checkpoints know it."""
        ...

    async def restart(self) -> None:
        """Start all learner ranks anew, as at step 0, and forget every published weight."""
        ...


@dataclass(frozen=True, slots=True)
class Course:
    """A run with everything that goes back when it continues from a checkpoint."""

    run: Run
    folder: RunFolder
    checkpoints: Checkpoints
    guard: DriftGuard
    stages: RestartableStages

    async def go_to(self, commit: Commit | None) -> int:
        """Go to the state after a checkpoint's step, or to that of step 0; returns the step.

        The run folder forgets what came after, and the drift guard sees what is left.
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
    """Put a run together: every observer in the order in which it looks at a step."""
    guard = guard_of(settings)
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
