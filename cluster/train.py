"""Train: ``python -m cluster.train PRESET_OR_TOML [--key value ...]``.

The first argument is a preset (shapes, words, preference, sd35-geneval, sd35-ocr, sd35-pickscore) or a TOML
file; every key of the configuration can be overridden, for instance ``--selection.keep 8 --steps 40``.
``--dry-run`` prints the resolved configuration and the plan. ``--resume RUN_FOLDER`` continues a run.
``--auto-resume`` with ``--folder`` starts a run, or continues it where an attempt before this one left off.

Exit status: 0 when all steps are done, 1 when the run failed, 2 when it was refused, 3 when all steps are
done and not one applied an update, 130 when it was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from rich.console import Console

from cluster.actors.actor_spec import connect, joined
from cluster.actors.learner import LearnerError, LearnerLost
from cluster.actors.library_warnings import LibraryWarnings
from cluster.actors.pool import PoolError
from cluster.actors.reservation import hold
from cluster.actors.samplers import WeightsError
from cluster.actors.stages import start_stages
from cluster.config.errors import UserError
from cluster.config.preflight import Inputs, check, plan
from cluster.config.settings import RunSettings, parse_overrides, preset_names, resolve, to_toml
from cluster.interrupts import INTERRUPTED, Interrupts
from cluster.loop.checks import RunStopped
from cluster.loop.course import course_of
from cluster.loop.recovery import GaveUp, train_through_losses
from cluster.loop.resume import announce, changed_packages, resumable, started_before
from cluster.process import leave
from cluster.record.checkpoints import CheckpointError, Checkpoints, checkpoints_of
from cluster.record.events import recording, warn, watch
from cluster.record.marker import Commit
from cluster.record.nothing_learned import nothing_learned
from cluster.record.run_folder import FolderError, RunFolder
from cluster.report.report import write_report
from cluster.report.summary import summary_table
from cluster.trackers.display import Display
from cluster.trackers.prometheus import Prometheus
from cluster.trackers.ray_job import Job, submission
from cluster.trackers.tensorboard import TensorBoard
from cluster.trackers.waiting import Waiting

PROG = "python -m cluster.train"
LEARNED_NOTHING = 3
FAILURES = (
    PoolError, LearnerError, LearnerLost, GaveUp, WeightsError, RunStopped, CheckpointError, FolderError
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    console = Console()
    try:
        return _main(arguments, console)
    except UserError as error:
        _complain("error", error)
        return 2
    except KeyboardInterrupt:
        console.print("stopped")
        return INTERRUPTED
    except FAILURES as error:
        _complain("failed", error)
    except ExceptionGroup as group:
        known, rest = group.split(FAILURES)
        if known is None or rest is not None:
            raise
        for failure in known.exceptions:
            _complain("failed", failure)
    return 1


def _complain(what: str, error: Exception) -> None:
    Console(stderr=True).print(f"{what}: {error}", markup=False, highlight=False, soft_wrap=True)


def _main(arguments: list[str], console: Console) -> int:
    options, settings = configure(arguments)
    inputs = check(settings, reach=not options.dry_run)
    for remark in inputs.remarks:
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    if options.dry_run:
        console.print(to_toml(settings), markup=False, highlight=False, soft_wrap=True)
        console.print(plan(settings, inputs))
        return 0
    return _run(settings, inputs, options, console)


def configure(arguments: list[str]) -> tuple[argparse.Namespace, RunSettings]:
    """What a command line asks for: its options, and the configuration with a run folder.

    Raises:
        UserError: naming the argument or the key.
    """
    parser = argparse.ArgumentParser(prog=PROG, add_help=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--auto-resume", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    source = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if source is None and {"-h", "--help"} & set(rest):
        Console().print(__doc__)
    overrides = parse_overrides(rest, PROG)
    if options.resume:
        if source is not None:
            raise UserError("--resume takes its configuration from the run folder; leave the preset out")
        source, overrides["folder"] = str(options.resume / "config.toml"), str(options.resume)
    if source is None:
        raise UserError(f"which preset or TOML file? Presets are {', '.join(preset_names())}")
    settings = resolve(source, overrides)
    if options.auto_resume and (options.resume or settings.folder is None):
        raise UserError("--auto-resume needs --folder, the same in every attempt, and excludes --resume")
    folder = settings.folder or Path("runs") / f"{settings.preset}-{stamp()}"
    return options, settings.model_copy(update={"folder": folder})


def stamp() -> str:
    """Now, as part of the name of a run."""
    return time.strftime("%Y%m%d-%H%M%S")


def _run(settings: RunSettings, inputs: Inputs, options: argparse.Namespace, console: Console) -> int:
    assert settings.folder is not None
    folder = RunFolder(settings.folder)
    checkpoints = checkpoints_of(settings, folder)
    commit = _start_or_resume(settings, folder, checkpoints, options)
    if commit and (changes := changed_packages(commit)):
        console.print(f"packages have changed, so numbers may differ slightly: {changes}", highlight=False)
    console.print(f"run folder {folder.path}", highlight=False, soft_wrap=True)
    if submission() and not folder.path.is_absolute():
        console.print(
            "it is part of the job's own folder, which Ray removes; name a lasting one with --folder"
        )
    started = time.perf_counter()
    record = recording(
        folder.path, folder.path.name, after_step=commit.step if commit else 0, pid=os.getpid()
    )
    interrupts, tell = Interrupts(console), partial(console.print, highlight=False, soft_wrap=True)
    heard = LibraryWarnings(tell)
    with _given_back(folder, commit is None and not options.auto_resume), record, interrupts.taken():
        announce(commit, folder, checkpoints, tell)
        for remark in inputs.remarks:
            warn("preflight", remark=remark)
        try:
            where = joined(settings.cluster)
            with Waiting(console).shown(f"joining Ray at {where}" if where else "starting Ray"):
                connect(settings.cluster)
                interrupts.starting()
                learners = hold(settings, tell)
            ended = asyncio.run(
                _train(settings, inputs, folder, checkpoints, commit, console, learners, interrupts, heard)
            )
        finally:
            interrupts.closing()
            if ray.is_initialized():
                heard.collect()
            ray.shutdown()
    return _farewell(settings, folder, ended, time.perf_counter() - started, console)


@contextmanager
def _given_back(folder: RunFolder, fresh: bool) -> Iterator[None]:
    """Free a fresh folder's name again if the run is refused or stopped before it did anything."""
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
    heard: LibraryWarnings,
) -> tuple[int, str]:
    """The steps that are done in the end, and if these are all and taught nothing, why."""
    job, start = Job(str(folder.path), settings.steps), commit.step if commit else 0
    tell = partial(console.print, highlight=False, soft_wrap=True)
    display, board = Display(console, settings.steps, start), TensorBoard(folder.tensorboard)
    with Waiting(console).shown("starting the actors") as waiting:
        stages = start_stages(settings, learners)
        await waiting.until(stages.ready(), lambda: f"starting: {stages.missing or 'the last actor'}")
        heard.collect()
        gauges = Prometheus(folder.path.name, stages)
        trackers = (folder.log, board.log, gauges.log, display.step, watch, job.log, heard.log)
        course = course_of(settings, inputs, folder, checkpoints, stages, trackers)
        if commit:
            waiting.say(f"reading the checkpoint of step {start}")
        await course.go_to(commit)
    interrupts.training(course.run.stop)
    with display:
        try:
            done = await train_through_losses(course, start, tell)
        finally:
            board.close()
    job.tell(checkpoint=str(done))  # the last step and a stop commit one
    if done < settings.steps or course.run.updates:
        return done, ""
    why = nothing_learned(folder.history(), settings.groups_per_step)
    warn("nothing learned", reason=why)
    return done, why


def _farewell(
    settings: RunSettings, folder: RunFolder, ended: tuple[int, str], seconds: float, console: Console
) -> int:
    done, why = ended
    report: Any = write_report(folder.path)
    console.print(summary_table(folder.path))
    console.print(f"{done} of {settings.steps} steps, {seconds / 60:.1f} minutes", highlight=False)
    console.print(f"report {report}", highlight=False, soft_wrap=True)
    if done < settings.steps:
        resume = f"{PROG} --resume {folder.path}"
        console.print(f"stopped; continue with: {resume}", highlight=False, soft_wrap=True)
        return INTERRUPTED
    if why:
        console.print(f"nothing was learned, no update was applied: {why}", highlight=False, soft_wrap=True)
        return LEARNED_NOTHING
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
