"""Handlers of Ctrl-C and SIGTERM: the first signal stops a run as its phase allows, the second at once."""

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
MESSAGE_WAIT: Final = 0.5
"""Seconds to wait until the message is printed, which is delayed while the main thread is printing."""


@dataclass(frozen=True, slots=True)
class _Phase:
    """The message and the action of the first signal, and the message of a second one."""

    first: str
    act: Callable[[], None]
    second: str = "ended at once"


def _leave() -> NoReturn:
    raise KeyboardInterrupt


def _finish() -> None:
    """Do nothing, so that the phase ends by itself."""


START: Final = "stopping while the run starts, before its first step"
CONNECTING: Final = _Phase(START, _finish)
STARTING: Final = _Phase(START, _leave)
CLOSING: Final = _Phase("the run is over and ends its actors", _finish)


class Interrupts:
    """Signal handlers of a run: a signal ends its start at once, and its training after the current step.

    Python runs handlers in the main thread, which may be in a call of Ray's for seconds. So a thread of its
    own receives the signals and prints their effect at once; the handlers only act.
    """

    def __init__(self, console: Console) -> None:
        """Print messages on a console."""
        self.console = console
        self._phase = CONNECTING
        self._received = self._announced = False
        self._printed = threading.Event()

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handle the signals within a block, after which the previous handlers are restored."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        received, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        reader = threading.Thread(target=self._read, args=(received,), daemon=True)
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
        """Enter the phase after Ray was started, in which a signal ends the start at once.

        Raises:
            KeyboardInterrupt: if a signal was received before.
        """
        self._phase = STARTING
        self._listen()
        self._leave_if_received()

    def training(self, stop: asyncio.Event) -> None:
        """Enter training, in which the first signal sets an event that ends the run after its step.

        Raises:
            KeyboardInterrupt: if a callback of Ray's swallowed that of a signal received before.
        """
        self._leave_if_received()
        self._phase = _Phase(
            "stopping after this step and its checkpoint",
            stop.set,
            "ended at once, without a checkpoint of this step",
        )

    def closing(self) -> None:
        """Enter the last phase, which only ends actors and cannot be stopped."""
        self._phase = CLOSING

    def _listen(self) -> None:
        """Set the handlers; also after Ray has started, which sets its own."""
        for number in SIGNALS:
            signal.signal(number, self._act)

    def _act(self, *_: object) -> None:
        self._received = True
        self._printed.wait(MESSAGE_WAIT)  # so that the message is that of this phase, not of the next one
        self._phase.act()

    def _leave_if_received(self) -> None:
        if self._received:
            _leave()

    def _read(self, received: socket.socket) -> None:
        with received:
            while signals := received.recv(16):
                for number in signals:
                    if number in SIGNALS:
                        self._announce()

    def _announce(self) -> None:
        if self._announced:
            self._end()
        self._announced = True
        note("stop asked for")
        self._print(f"{self._phase.first} (Ctrl-C again: at once)")
        self._printed.set()

    def _end(self) -> NoReturn:
        """Exit at once: a local node ends with this process, and Ray ends the actors on other nodes."""
        note("ended at once")
        self._print(self._phase.second)
        self.console.show_cursor()
        _kill_descendants()
        os._exit(Status.INTERRUPTED)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def _kill_descendants() -> None:
    """Kill all descendants of this process, suspending them first so that they cannot start others."""
    halted: set[psutil.Process] = set()
    while new := set(psutil.Process().children(recursive=True)) - halted:
        halted |= new
        for process in new:
            with suppress(psutil.Error):  # it has ended already
                process.suspend()
    for process in halted:
        with suppress(psutil.Error):
            process.kill()
