"""Show a run in a terminal.

A run that goes on is shown until it ends or Ctrl-C; one that has ended, or output that is no terminal, is
shown once.
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
"""Seconds between looks."""


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser(prog=program("watch"), description=__doc__)
    parser.add_argument(
        "run", metavar="RUN", help="the folder of a run, here or at an fsspec URL whose package is installed"
    )
    run = parser.parse_args(arguments).run
    with suppress(KeyboardInterrupt):
        show(Follower(run), Console())
    return Status.DONE


def show(follower: Follower, console: Console) -> None:
    """Show a run until it has ended, or once where nothing can be shown twice."""
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
