"""What a start waits for: a live line in a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console

LOOK: Final = 0.2
"""Seconds between two looks at what is missing."""
EVERY: Final = 30.0
"""Seconds between two lines where there is no terminal."""


class Waiting:
    """Shows what is being waited for."""

    def __init__(self, console: Console) -> None:
        """``console`` decides between a live line and plain ones."""
        self.console = console
        self._status = console.status("starting")
        self._since, self._said = time.monotonic(), float("-inf")

    @contextmanager
    def shown(self, story: str) -> Iterator[Waiting]:
        """Show a story until it is over, or until there is another one."""
        with self._status:
            self.say(story)
            yield self

    def say(self, story: str) -> None:
        """Show a story; without a terminal, if the last one is some time ago."""
        now = time.monotonic()
        if self.console.is_terminal:
            self._status.update(story)
        elif now - self._said >= EVERY:
            self._said = now
            self.console.print(f"{story} ({now - self._since:.0f} s)", highlight=False, soft_wrap=True)

    async def until(self, work: Coroutine[Any, Any, None], missing: Callable[[], str]) -> None:
        """Wait for some work and show meanwhile what is missing."""
        task = asyncio.create_task(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=LOOK)
                self.say(missing())
            task.result()
        finally:
            task.cancel()
