"""Train a model, or continue a run.

The first argument is a preset or a TOML file; every key of the configuration can be overridden, for instance
``--selection.keep 8 --steps 40``. Ctrl-C ends a run after its step, with a checkpoint to resume from.

Exit status: 0 when all steps are done, 1 when the run failed, 2 when it was refused, 3 when all steps are
done but none applied an update, 130 when it was stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.config.command import Parser, Status, guarded, program, read, required
from cluster.config.errors import UserError
from cluster.config.settings import ClusterSettings, RunSettings
from cluster.config.sources import resolve, to_toml
from cluster.process import leave
from cluster.record.names import CONFIG


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    options, settings = configure(arguments)
    from rich.console import Console

    from cluster.config.preflight import check

    console = Console()
    inputs = check(settings, reach=None if options.dry_run else _reach)
    for remark in inputs.remarks:
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    if options.dry_run:
        from cluster.plan.step import plan

        console.print(to_toml(settings), markup=False, highlight=False, soft_wrap=True)
        console.print(plan(settings, inputs))
        return Status.DONE
    from cluster.service import serve

    return serve(settings, inputs, options, console)


def _reach(settings: ClusterSettings) -> None:
    """Check that the cluster answers; the import is late, since only a run that joins one needs Ray here."""
    from cluster.actors.connection import check_address

    check_address(settings)


def configure(arguments: Sequence[str]) -> tuple[argparse.Namespace, RunSettings]:
    """Parse a command line into its options and the configuration, which names a run folder.

    Raises:
        UserError: naming the argument or the key.
    """
    options, source, overrides = read(_parser(), arguments)
    if options.resume:
        if source is not None:
            raise UserError("--resume takes its configuration from the run folder; leave the preset out")
        if not (options.resume / CONFIG).is_file():
            raise UserError(f"--resume: {options.resume} is not a run folder: it has no {CONFIG}")
        source, overrides["folder"] = str(options.resume / CONFIG), str(options.resume)
    settings = resolve(required(source), overrides)
    if options.auto_resume and (options.resume or settings.folder is None):
        raise UserError("--auto-resume needs --folder, the same in every attempt, and excludes --resume")
    folder = settings.folder or Path("runs") / f"{settings.preset}-{stamp()}"
    return options, settings.model_copy(update={"folder": folder})


def _parser() -> Parser:
    parser = Parser(
        keys=True,
        prog=program("train"),
        usage="%(prog)s PRESET_OR_TOML [--section.key VALUE ...] [--dry-run] [--auto-resume]\n"
        "       %(prog)s --resume RUN_FOLDER [--section.key VALUE ...]",
        description=__doc__,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the configuration and the plan without starting the run"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="RUN_FOLDER", help="continue a run from its newest checkpoint"
    )
    parser.add_argument(
        "--auto-resume", action="store_true",
        help="with --folder: start a run, or continue it from the last checkpoint of an earlier attempt",
    )  # fmt: skip
    return parser


def stamp() -> str:
    """Format the current time for the name of a run."""
    return time.strftime("%Y%m%d-%H%M%S")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
