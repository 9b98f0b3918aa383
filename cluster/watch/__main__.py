"""Show a run's progress in a terminal.

A run in progress is shown until it ends or until Ctrl-C. A run that has ended is shown once, and so is any
run where the output is not a terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Final

from rich.console import Console
from rich.live import Live

from cluster.config.command import Parser, Status, guarded, program
from cluster.watch.follower import Follower
from cluster.watch.view import view

EVERY: Final = 2.0
"""Seconds between two updates."""


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    parser = Parser(prog=program("watch"), description=__doc__)
    parser.add_argument(
        "run", metavar="RUN", help="the folder of a run, here or at an fsspec URL whose package is installed"
    )
    run = parser.parse_args(arguments).run
    with suppress(KeyboardInterrupt):
        show(Follower(run), Console())
    return Status.DONE


def show(follower: Follower, console: Console) -> None:
    """Show a run until it has ended, or once if the console is not a terminal."""
    name = PurePosixPath(follower.url.rstrip("/")).name
    run = follower.look()
    if run.ended or not console.is_terminal:
        console.print(view(name, run))
        return
    with Live(view(name, run), console=console, auto_refresh=False) as live:
        while not run.ended:
            time.sleep(EVERY)
            run = follower.look()
            live.update(view(name, run), refresh=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
