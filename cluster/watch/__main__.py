"""Watch a run in a terminal: ``python -m cluster.watch RUN``.

RUN is a run folder, here or at any fsspec URL whose package is installed. A run that goes on is shown until
it ends or Ctrl-C; one that has ended, or output that is no terminal, is shown once.
"""

from __future__ import annotations

import sys
import time
from pathlib import PurePosixPath

from rich.console import Console
from rich.live import Live

from cluster.config.errors import UserError
from cluster.watch.follower import Follower
from cluster.watch.view import view

PROG = "python -m cluster.watch"
EVERY = 2.0
"""Seconds between looks."""


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        asked = {"-h", "--help"} & set(arguments)
        print(__doc__ if asked else f"error: usage: {PROG} RUN", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        show(Follower(arguments[0]), Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


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
