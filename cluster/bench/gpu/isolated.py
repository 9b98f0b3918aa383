"""Run a check in a process of its own, so that one that hangs or crashes takes nothing else with it.

The processes are forks of a server that has imported the heavy libraries once and never touches the GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import psutil

from cluster.bench.gpu.check import Check, Outcome, Setup, SkippedError, judged
from cluster.bench.table import Measurement

PRELOADED: Final = ["torch", "diffusers", "peft", "transformers", "rollout.worker", "learner.worker"]
Seen = Callable[[Measurement], None]
LINES: Final = 12
"""Lines of a traceback or of a process's output that a reason quotes."""


class Isolation:
    """A server of processes for checks."""

    def __init__(self) -> None:
        """Start the server, and wait until it has imported the libraries."""
        # Asking the driver library whether there is a GPU would make forks of the server useless for CUDA.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        first = self.context.Process(target=_nothing)
        first.start()
        first.join()

    def run(self, check: Check, setup: Setup, seconds: float, seen: Seen) -> Outcome:
        """Run a check for at most some seconds; its process, and all that it has started, then end.

        ``seen`` is called with every measurement as it is made.
        """
        lacking = check.lacks()
        if lacking:
            return Outcome(check, "skipped", 0.0, [], f"{lacking} is not installed")
        theirs, ours = self.context.Pipe()
        log = setup.folder / re.sub(r"\W+", "-", f"{check.part} {check.name} {check.model}.log")
        process = self.context.Process(target=_work, args=(theirs, check, setup, log))
        began = time.monotonic()
        process.start()
        theirs.close()
        try:
            return _outcome(check, ours, began, seconds, log, seen)
        finally:
            _end(process.pid)
            process.join()
            ours.close()


def _nothing() -> None:
    """Do nothing."""


def _outcome(check: Check, ours: Connection, began: float, seconds: float, log: Path, seen: Seen) -> Outcome:
    """Collect the messages of a check until its last one, its end or its deadline."""
    rows: list[Measurement] = []
    while ours.poll(max(0.0, began + seconds - time.monotonic())):
        taken = time.monotonic() - began
        try:
            kind, content = ours.recv()
        except (EOFError, ConnectionResetError):
            return Outcome(check, "failed", taken, rows, f"its process ended: {_last_lines(log)}")
        if kind == "done":
            return judged(check, taken, rows)
        if kind != "row":
            return Outcome(check, kind, taken, rows, content)
        rows.append(content)
        seen(content)
    reason = f"not done within {seconds:.0f} s; its output ends: {_last_lines(log)}"
    return Outcome(check, "failed", time.monotonic() - began, rows, reason)


def _work(theirs: Connection, check: Check, setup: Setup, log: Path) -> None:
    """Send every measurement as it is made, and how the check ended."""
    multiprocessing.set_start_method("fork", force=True)  # tqdm's lock would outlive a process killed
    with log.open("wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    try:
        for row in check.function()(setup):
            theirs.send(("row", row))
        last = ("done", "")
    except SkippedError as skipped:
        last = ("skipped", str(skipped))
    except Exception:
        lines = traceback.format_exc().replace(f"{Path.cwd()}/", "").splitlines()
        last = ("failed", "\n".join(lines[-LINES:]))
    theirs.send(last)
    os._exit(0)  # what a broken CUDA context or a killed actor leaves behind must not hold up the end


def _end(pid: int | None) -> None:
    """Kill a process with all that it has started."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [*root.children(recursive=True), root]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _last_lines(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.rpartition("\r")[2] for line in text.splitlines() if line.strip()]  # progress bars
    return "\n".join(lines[-LINES:]) or "no output"
