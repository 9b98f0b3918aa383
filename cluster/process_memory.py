"""What processes hold, as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")


def private_bytes(pid: int | str = "self") -> float:
    """Memory that a process has for itself; pages of files, libraries and the object store are not in it."""
    return _status(pid, "RssAnon")


def peak_of(work: Callable[[], Found]) -> tuple[Found, float]:
    """What some work in this process returns, and the most that the process held meanwhile."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak so far
    found = work()
    return found, _status("self", "VmHWM")


def private_peak() -> float:
    """The most that this process has held for itself so far, as far as Linux tells."""
    return _status("self", "VmHWM") - _status("self", "RssFile") - _status("self", "RssShmem")


def _status(pid: int | str, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024.0
