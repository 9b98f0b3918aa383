"""Measure the memory of processes, and end one that has used Ray."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

Found = TypeVar("Found")


def leave(status: int) -> NoReturn:
    """End the process with a status, without finalising the interpreter.

    Calls that were given up leave callbacks in Ray's threads, which crash when the interpreter goes first; a
    run that has finished would then be reported, and tried again, as one that failed.
    """
    atexit._run_exitfuncs()  # Ray's own, which ends its processes, and everybody else's
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def private_bytes(pid: int | str = "self") -> float:
    """Read the memory that a process has for itself, without files, libraries and the object store."""
    return _status(pid, "RssAnon")


def peak_of(work: Callable[[], Found]) -> tuple[Found, float]:
    """Run some work in this process; return its result and the peak of the process's memory meanwhile."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak so far
    found = work()
    return found, _status("self", "VmHWM")


def private_peak() -> float:
    """Read the peak of the memory that this process has had for itself, as far as Linux tells."""
    return _status("self", "VmHWM") - _status("self", "RssFile") - _status("self", "RssShmem")


def _status(pid: int | str, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024.0
