"""Measure the memory of processes, quieten libraries, and exit a process that has used Ray."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

Result = TypeVar("Result")


def leave(status: int) -> NoReturn:
    """Exit the process with a status, without finalising the interpreter.

    Abandoned calls leave callbacks in Ray's threads, which crash if the interpreter is finalised before them;
    a finished run would then be reported, and retried, as a failed one.
    """
    atexit._run_exitfuncs()  # among them Ray's, which ends its processes
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def private_bytes(pid: int | str = "self") -> float:
    """Read a process's private memory in bytes, without files, libraries and the object store."""
    return _status(pid, "RssAnon")


def peak_of(work: Callable[[], Result]) -> tuple[Result, float]:
    """Run some work in this process; return its result and the process's peak memory meanwhile, in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    result = work()
    return result, _status("self", "VmHWM")


def private_peak() -> float:
    """Read the peak of this process's private memory in bytes, as far as Linux reports it."""
    return _status("self", "VmHWM") - _status("self", "RssFile") - _status("self", "RssShmem")


def _status(pid: int | str, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024.0


def quieten() -> None:
    """Silence the progress bars and warnings of libraries, which each model that is loaded would repeat."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
