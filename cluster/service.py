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
from cluster.actors.stages import start_stages
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
from cluster.report.summary import summary_table
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
    if commit and (changes := changed_packages(commit)):
        console.print(f"packages have changed, so numbers may differ slightly: {changes}", highlight=False)
    console.print(f"run folder {folder.path}", highlight=False, soft_wrap=True)
    if submission() and not folder.path.is_absolute():
        console.print("it is in the job's own folder, which Ray removes; name a permanent one with --folder")
    started = time.perf_counter()
    record = recording(
        folder.path, folder.path.name, after_step=commit.step if commit else 0, pid=os.getpid()
    )
    interrupts, print_line = Interrupts(console), partial(console.print, highlight=False, soft_wrap=True)
    library_warnings = LibraryWarnings(print_line)
    fresh = commit is None and not options.auto_resume
    with _abandoned_if_refused(folder, fresh), record, interrupts.handling():
        report_losses(commit, folder, checkpoints, print_line)
        for remark in inputs.remarks:
            warn("preflight", remark=remark)
        try:
            address = joined(settings.cluster)
            with Waiting(console).shown(f"joining Ray at {address}" if address else "starting Ray"):
                connect(settings.cluster)
                interrupts.starting()
                learners = reserve(settings, print_line)
            outcome = asyncio.run(
                _train(
                    settings, inputs, folder, checkpoints, commit, console, learners, interrupts,
                    library_warnings,
                )
            )  # fmt: skip
        finally:
            interrupts.closing()
            if ray.is_initialized():
                library_warnings.collect()
            ray.shutdown()
    return _print_summary(settings, folder, outcome, time.perf_counter() - started, console)


@contextmanager
def _abandoned_if_refused(folder: RunFolder, fresh: bool) -> Iterator[None]:
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


async def _train(
    settings: RunSettings,
    inputs: Inputs,
    folder: RunFolder,
    checkpoints: Checkpoints,
    commit: Commit | None,
    console: Console,
    learners: PlacementGroup,
    interrupts: Interrupts,
    library_warnings: LibraryWarnings,
) -> tuple[int, str]:
    """Train, and return the steps done and, if these are all but none applied an update, the reason."""
    job, start = Job(str(folder.path), settings.steps), commit.step if commit else 0
    print_line = partial(console.print, highlight=False, soft_wrap=True)
    display, board = Display(console, settings.steps, start), TensorBoard(folder.tensorboard)
    with Waiting(console).shown("starting the actors") as waiting:
        stages = start_stages(settings, learners)
        await waiting.until(stages.ready(), lambda: f"starting: {stages.missing or 'the last actor'}")
        library_warnings.collect()
        gauges = Prometheus(folder.path.name, stages)
        trackers = (folder.log, board.log, gauges.log, display.step, watch, job.log, library_warnings.log)
        course = course_of(settings, inputs, folder, checkpoints, stages, trackers)
        if commit:
            waiting.show(f"reading the checkpoint of step {start}")
        await course.go_to(commit)
    interrupts.training(course.run.stop)
    with display:
        try:
            done = await train_through_losses(course, start, print_line)
        finally:
            board.close()
    job.publish(checkpoint=str(done))  # the last step and a stop commit one
    if done < settings.steps or course.run.updates:
        return done, ""
    reason = nothing_learned(folder.history(), settings.groups_per_step)
    warn("nothing learned", reason=reason)
    return done, reason


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
