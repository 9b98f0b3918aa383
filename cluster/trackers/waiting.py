"""The progress of a start: a live line in a terminal, a plain line every half minute elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console

POLL: Final = 0.2
"""Seconds between two updates of the live line."""
EVERY: Final = 30.0
"""Seconds between two plain lines."""


class Waiting:
    """The display of what a start waits for."""

    def __init__(self, console: Console) -> None:
        """Print on a console: a live line if it is a terminal, else plain ones."""
        self.console = console
        self._status = console.status("starting")
        self._since, self._shown = time.monotonic(), float("-inf")

    @contextmanager
    def shown(self, message: str) -> Iterator[Waiting]:
        """Show a message during the block, or until another one is shown."""
        with self._status:
            self.show(message)
            yield self

    def show(self, message: str) -> None:
        """Show a message; without a terminal, only if the last one was ``EVERY`` seconds ago."""
        now = time.monotonic()
        if self.console.is_terminal:
            self._status.update(message)
        elif now - self._shown >= EVERY:
            self._shown = now
            self.console.print(f"{message} ({now - self._since:.0f} s)", highlight=False, soft_wrap=True)

    async def until(self, work: Coroutine[Any, Any, None], missing: Callable[[], str]) -> None:
        """Wait for some work, and show what is missing meanwhile."""
        task = asyncio.create_task(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=POLL)
                self.show(missing())
            task.result()
        finally:
            task.cancel()
