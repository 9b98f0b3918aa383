"""The service: one run on Ray, from the connection to the report."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import ray
from ray.util.placement_group import PlacementGroup
from rich.console import Console

from cluster.actors.connection import connect
from cluster.actors.library_warnings import LibraryWarnings
from cluster.actors.reservation import reserve
from cluster.actors.stages import RayStages, start_stages
from cluster.config.address import joined
from cluster.config.command import Status
from cluster.config.errors import UserError
from cluster.config.preflight import Inputs
from cluster.config.settings import RunSettings
from cluster.interrupts import Interrupts
from cluster.loop.course import course_of
from cluster.loop.recovery import train_through_losses
from cluster.loop.resume import changed_packages, report_losses, resumable, started_before
from cluster.record.checkpoints import Checkpoints, checkpoints_of
from cluster.record.events import recording, warn, watch
from cluster.record.marker import Commit
from cluster.record.nothing_learned import nothing_learned
from cluster.record.run_folder import RunFolder
from cluster.report.report import write_report
from cluster.report.summary_table import summary_table
from cluster.trackers.display import Display
from cluster.trackers.prometheus import Prometheus
from cluster.trackers.ray_job import Job, submission
from cluster.trackers.tensorboard import TensorBoard
from cluster.trackers.waiting import Waiting

TRAIN: Final = "python -m cluster.train"
"""The command that jobs and manifests use, for the printed line that continues a run."""


def serve(settings: RunSettings, inputs: Inputs, options: argparse.Namespace, console: Console) -> int:
    """Run the service from a checked configuration to the report, and return the exit status.

    Raises:
        UserError: if the run is refused before its first step.
        RunFailed: if it cannot continue.
        KeyboardInterrupt: if it is stopped before its first step.
    """
    assert settings.folder is not None
    folder = RunFolder(settings.folder)
    checkpoints = checkpoints_of(settings, folder)
    commit = _start_or_resume(settings, folder, checkpoints, options)
    service = Service(settings, inputs, folder, checkpoints, commit, console)
    service.introduce()
    started = time.perf_counter()
    with _abandoned_if_refused(folder, fresh=commit is None and not options.auto_resume):
        outcome = service.run()
    return _print_summary(settings, folder, outcome, time.perf_counter() - started, console)


@contextmanager
def _abandoned_if_refused(folder: RunFolder, *, fresh: bool) -> Iterator[None]:
    """Remove a fresh folder if the run is refused or stopped before its first step."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        if fresh:
            folder.abandon()
        raise


def _start_or_resume(
    settings: RunSettings, folder: RunFolder, checkpoints: Checkpoints, options: argparse.Namespace
) -> Commit | None:
    if options.resume:
        return resumable(settings, folder, checkpoints)
    if options.auto_resume:
        return started_before(settings, folder, checkpoints)
    folder.create(settings)
    return None


class Service:
    """A run from its connection to Ray to its last step."""

    def __init__(
        self,
        settings: RunSettings,
        inputs: Inputs,
        folder: RunFolder,
        checkpoints: Checkpoints,
        commit: Commit | None,
        console: Console,
    ) -> None:
        """Prepare a run that starts at the step of ``commit``, or at 0."""
        self.settings, self.inputs, self.console = settings, inputs, console
        self.folder, self.checkpoints, self.commit = folder, checkpoints, commit
        self.start = commit.step if commit else 0
        self.print_line = partial(console.print, highlight=False, soft_wrap=True)
        self.interrupts, self.library_warnings = Interrupts(console), LibraryWarnings(self.print_line)

    def introduce(self) -> None:
        """Print the run folder, and what its reader should know before the run starts."""
        if self.commit and (changes := changed_packages(self.commit)):
            self.console.print(
                f"packages have changed, so numbers may differ slightly: {changes}", highlight=False
            )
        self.print_line(f"run folder {self.folder.path}")
        if submission() and not self.folder.path.is_absolute():
            self.console.print(
                "it is in the job's own folder, which Ray removes; name a permanent one with --folder"
            )

    def run(self) -> tuple[int, str]:
        """Train; return the steps done and, if these are all but none applied an update, the reason."""
        start = {"after_step": self.start, "steps": self.settings.steps, "pid": os.getpid()}
        with recording(self.folder.path, self.folder.path.name, **start), self.interrupts.handling():
            report_losses(self.commit, self.folder, self.checkpoints, self.print_line)
            for remark in self.inputs.remarks:
                warn("preflight", remark=remark)
            try:
                return asyncio.run(self._train(self._join()))
            finally:
                self.interrupts.closing()
                if ray.is_initialized():
                    self.library_warnings.collect()
                ray.shutdown()

    def _join(self) -> PlacementGroup:
        """Connect to Ray and reserve the resources of the run; return those of the learner's ranks."""
        address = joined(self.settings.cluster)
        with Waiting(self.console).shown(f"joining Ray at {address}" if address else "starting Ray"):
            connect(self.settings.cluster)
            self.interrupts.starting()
            return reserve(self.settings, self.print_line)

    async def _train(self, learners: PlacementGroup) -> tuple[int, str]:
        job = Job(str(self.folder.path), self.settings.steps)
        display = Display(self.console, self.settings.steps, self.start)
        board = TensorBoard(self.folder.tensorboard)
        with Waiting(self.console).shown("starting the actors") as waiting:
            stages = await self._started(learners, waiting)
            gauges = Prometheus(self.folder.path.name, stages)
            trackers = (
                self.folder.log, board.log, gauges.log, display.step, watch, job.log,
                self.library_warnings.log,
            )  # fmt: skip
            course = course_of(self.settings, self.inputs, self.folder, self.checkpoints, stages, trackers)
            if self.commit:
                waiting.show(f"reading the checkpoint of step {self.start}")
            await course.go_to(self.commit)
        self.interrupts.training(course.run.stop)
        with display:
            try:
                done = await train_through_losses(course, self.start, self.print_line)
            finally:
                board.close()
        job.publish(checkpoint=str(done))  # the last step and a stop commit one
        return done, "" if done < self.settings.steps or course.run.updates else self._nothing_learned()

    async def _started(self, learners: PlacementGroup, waiting: Waiting) -> RayStages:
        """Start every actor, and wait until they are ready."""
        stages = start_stages(self.settings, learners)
        await waiting.until(stages.ready(), lambda: f"starting: {stages.missing or 'the last actor'}")
        self.library_warnings.collect()
        return stages

    def _nothing_learned(self) -> str:
        """Return the reason why no update was applied, and log it."""
        reason = nothing_learned(self.folder.history(), self.settings.groups_per_step)
        warn("nothing learned", reason=reason)
        return reason


def _print_summary(
    settings: RunSettings, folder: RunFolder, outcome: tuple[int, str], seconds: float, console: Console
) -> int:
    done, reason = outcome
    report: Any = write_report(folder.path)
    console.print(summary_table(folder.path))
    console.print(f"{done} of {settings.steps} steps, {seconds / 60:.1f} minutes", highlight=False)
    console.print(f"report {report}", highlight=False, soft_wrap=True)
    if done < settings.steps:
        resume = f"{TRAIN} --resume {folder.path}"
        console.print(f"stopped; continue with: {resume}", highlight=False, soft_wrap=True)
        return Status.INTERRUPTED
    if reason:
        console.print(f"no update was applied: {reason}", highlight=False, soft_wrap=True)
        return Status.LEARNED_NOTHING
    return Status.DONE
