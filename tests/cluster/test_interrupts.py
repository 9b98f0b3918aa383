"""Ctrl-C: its effect is printed at once even if the main thread is busy, and a second one ends the run."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.support.service_process import ROOT

LONG = "60"
FIRST = {
    "connect": "stopping while the run starts, before its first step (Ctrl-C again: at once)",
    "start": "stopping while the run starts, before its first step (Ctrl-C again: at once)",
    "train": "stopping after this step and its checkpoint (Ctrl-C again: at once)",
}


class Terminal:
    """A program in its own terminal, 80 columns wide."""

    def __init__(self, phase: str, seconds: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.interruptible", phase, seconds],
            cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "COLUMNS": "80"},
        )  # fmt: skip
        os.close(slave)
        self.output = ""

    def read_until(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.output)):
            assert time.monotonic() < deadline, self.output
            try:
                self.output += os.read(self.master, 4096).decode().replace("\r\n", "\n")
            except OSError:  # the end, on Linux
                pytest.fail(f"ended without {pattern!r}:\n{self.output}")
        return found

    def interrupt(self, number: int = signal.SIGINT) -> None:
        os.kill(self.process.pid, number)


@pytest.fixture
def terminal() -> Iterator[Callable[[str, str], Terminal]]:
    """Start programs, which are ended after the test."""
    started: list[Terminal] = []

    def start(phase: str, seconds: str) -> Terminal:
        started.append(Terminal(phase, seconds))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        os.close(one.master)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", list(FIRST))
def test_the_first_is_answered_and_the_second_ends_it_while_the_main_thread_is_away(
    terminal: Callable[[str, str], Terminal], phase: str, number: int
) -> None:
    run = terminal(phase, LONG)
    child = psutil.Process(int(run.read_until(r"CHILD (\d+)")[1]))
    run.read_until("BLOCKED")
    time.sleep(0.3)  # until it is in the call
    run.interrupt(number)
    run.read_until(re.escape(FIRST[phase]), timeout=10)
    run.interrupt(number)
    run.read_until("ended at once")
    assert run.process.wait(10) == 130
    assert "BACK" not in run.output
    assert ("checkpoint" in run.output) == (phase == "train")
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("phase", ["connect", "start"])
def test_a_start_ends_when_the_call_is_over(terminal: Callable[[str, str], Terminal], phase: str) -> None:
    run = terminal(phase, "1")
    run.read_until("BLOCKED")
    run.interrupt()
    run.read_until("LEFT\n(.*\n)*OVER")
    assert FIRST[phase] in run.output
    assert run.process.wait(10) == 0
    assert "checkpoint" not in run.output


def test_nothing_is_lost_of_a_signal_while_the_main_thread_writes(
    terminal: Callable[[str, str], Terminal],
) -> None:
    run = terminal("start", "0")
    run.read_until("CHILD")
    run.interrupt()  # somewhere among starting, blocking and training
    run.read_until("OVER")
    assert run.output.count("(Ctrl-C again: at once)") == 1
    assert ("LEFT" in run.output) == (FIRST["start"] in run.output)


def test_a_step_ends_and_is_the_last(terminal: Callable[[str, str], Terminal]) -> None:
    run = terminal("train", "1")
    run.read_until("BLOCKED")
    run.interrupt()
    run.read_until("OVER")
    assert run.process.wait(10) == 0
    assert "LEFT" not in run.output
    assert run.output.count("BLOCKED") <= 2


def test_what_is_over_cannot_be_stopped_but_ended(terminal: Callable[[str, str], Terminal]) -> None:
    run = terminal("close", "0.2")
    run.read_until("BLOCKED")
    run.interrupt()
    run.read_until("stopping after this step")
    assert run.process.wait(30) == 0
