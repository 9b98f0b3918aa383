"""Ctrl-C and a polite kill: the first one stops a run as its phase allows, a second one ends it at once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, NoReturn

import psutil
from rich.console import Console

from cluster.config.command import Status
from cluster.record.events import note

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
ANSWER: Final = 0.5
"""Seconds that an answer has, which waits if the main thread was just writing."""


@dataclass(frozen=True, slots=True)
class _Phase:
    """What the first signal says and does, and what a second one says."""

    first: str
    act: Callable[[], None]
    second: str = "ended at once"


def _leave() -> NoReturn:
    raise KeyboardInterrupt


def _finish() -> None:
    """Let the phase end by itself."""


START: Final = "stopping while the run starts, before its first step"
CONNECTING: Final = _Phase(START, _finish)
STARTING: Final = _Phase(START, _leave)
CLOSING: Final = _Phase("the run is over and ends its actors", _finish)


class Interrupts:
    """Says at once what a signal does: while a run starts it ends it, later it asks for a last step.

    Python runs handlers in the main thread, which may be in a call of Ray's for seconds. So a thread of its
    own reads which signals came and answers; the handlers only act.
    """

    def __init__(self, console: Console) -> None:
        """Answer on a console."""
        self.console = console
        self._phase = CONNECTING
        self._came = self._asked = False
        self._answered = threading.Event()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the signals for as long as a run holds resources; those who had them get them back."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        came, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        reader = threading.Thread(target=self._read, args=(came,), daemon=True)
        reader.start()
        descriptor = signal.set_wakeup_fd(wakeup.fileno())
        self._listen()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)
            wakeup.close()
            reader.join()

    def starting(self) -> None:
        """Ray is there, so from now on a signal ends the start where it is.

        Raises:
            KeyboardInterrupt: if one has come before.
        """
        self._phase = STARTING
        self._listen()
        self._leave_if_asked()

    def training(self, stop: asyncio.Event) -> None:
        """From now on the first signal sets an event, on which the run ends after its step.

        Raises:
            KeyboardInterrupt: if one has come before, and a callback of Ray's has swallowed what it raised.
        """
        self._leave_if_asked()
        self._phase = _Phase(
            "stopping after this step and its checkpoint",
            stop.set,
            "ended at once, without a checkpoint of this step",
        )

    def closing(self) -> None:
        """From now on there is nothing to stop any more, only actors to end."""
        self._phase = CLOSING

    def _listen(self) -> None:
        """Set the handlers; also after Ray, which sets some of its own."""
        for number in SIGNALS:
            signal.signal(number, self._act)

    def _act(self, *_: object) -> None:
        self._came = True
        self._answered.wait(ANSWER)  # for the word of this phase, not of the next one
        self._phase.act()

    def _leave_if_asked(self) -> None:
        if self._came:
            _leave()

    def _read(self, came: socket.socket) -> None:
        with came:
            while signals := came.recv(16):
                for number in signals:
                    if number in SIGNALS:
                        self._answer()

    def _answer(self) -> None:
        if self._asked:
            self._end()
        self._asked = True
        note("stop asked for")
        self._say(f"{self._phase.first} (Ctrl-C again: at once)")
        self._answered.set()

    def _end(self) -> NoReturn:
        """Leave everything as it is; a node of our own goes with us, and Ray ends the actors on others."""
        note("ended at once")
        self._say(self._phase.second)
        self.console.show_cursor()
        _kill_descendants()
        os._exit(Status.INTERRUPTED)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def _kill_descendants() -> None:
    """Kill what this process has started; all of it is halted first, so that nothing new can come."""
    halted: set[psutil.Process] = set()
    while new := set(psutil.Process().children(recursive=True)) - halted:
        halted |= new
        for process in new:
            with suppress(psutil.Error):  # it has gone already
                process.suspend()
    for process in halted:
        with suppress(psutil.Error):
            process.kill()
