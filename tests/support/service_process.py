"""The whole service as a user starts it: ``python -m cluster.train`` in a session of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from cluster.actors.actor_spec import role_of
from selection.ledger import read_ledger
from tests.support.paths import ROOT

STEPS, GROUPS, CANDIDATES, KEEP, EVAL_EVERY = 8, 2, 4, 2, 4
REWARDS = [{"name": "jpeg"}, {"name": "shapes", "weight": 0.5}]
FLAGS = f"""
--steps {STEPS} --groups_per_step {GROUPS} --selection.candidates {CANDIDATES} --selection.keep {KEEP}
--eval_every {EVAL_EVERY} --eval_samples 1 --image_every 3 --checkpoint_every 2 --keep_checkpoints 2
--rollout.steps 3 --rollout.eval_steps 2 --rollout.batch 3 --learner.threads 2 --cluster.object_store_gb 0.2
""".split()


def prepare(folder: Path, model: Path, rewards: Sequence[dict[str, Any]] = REWARDS) -> list[str]:
    """A few prompts below a folder; returns the flags that name inputs and rewards."""
    for part, count in (("train", 7), ("eval", 3)):
        lines = (ROOT / f"rollout/tiny/prompts/shapes-{part}.jsonl").read_text().splitlines()[:count]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return [
        "--model.path", str(model), "--rewards", json.dumps(rewards),
        "--prompts.train", str(folder / "train.jsonl"), "--prompts.eval", str(folder / "eval.jsonl"),
    ]  # fmt: skip


class Service:
    """One start of the command line; its folder and its output stay for a look."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        """Start it; standard output and standard error go to a file."""
        self.folder = folder
        self.log = folder.with_suffix(f".{time.monotonic_ns()}.log")
        self.metrics_file = folder / "metrics.jsonl"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.train", *arguments],
                cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"},
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def finish(self, timeout: float = 400) -> int:
        """Wait for the end; returns the exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None

    def wait_until(self, happened: Callable[[], bool], timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            assert self.process.poll() is None, f"ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"nothing happened in {timeout} s:\n{self.output}"
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            return self.metrics_file.exists() and f'"step": {step},' in self.metrics_file.read_text()

        self.wait_until(reached)

    def interrupt(self) -> None:
        """What Ctrl-C does in a terminal: SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def family(self) -> list[psutil.Process]:
        """Every process that descends from this start."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def actors(self, role: str) -> list[psutil.Process]:
        """The processes of a role, as soon as there are any."""
        found: list[psutil.Process] = []

        def there() -> bool:
            found[:] = [process for process in self.family() if role_of(process) == role]
            return bool(found)

        self.wait_until(there)
        return found

    def kill(self) -> None:
        """SIGKILL of everything at once: the driver, its actors and Ray's own processes."""
        family = self.family()
        self.process.kill()
        for process in family:
            with suppress(psutil.NoSuchProcess):  # most of Ray's end when the driver does
                process.kill()
        psutil.wait_procs(family, timeout=20)
        self.process.wait()

    def end(self) -> None:
        """Kill what is left, and only what this start has started."""
        if self.process.poll() is None:
            self.kill()


@contextmanager
def services() -> Iterator[Callable[[list[str], Path], Service]]:
    """Starts services; what a failed test left running is ended."""
    started: list[Service] = []

    def start(arguments: list[str], folder: Path) -> Service:
        started.append(Service(arguments, folder))
        return started[-1]

    yield start
    for service in started:
        service.end()


def survivors(family: list[psutil.Process], session: int) -> list[psutil.Process]:
    """Which of some processes, or of a session, are still there after some seconds of grace."""
    psutil.wait_procs(family, timeout=20)
    own = [process for process in psutil.process_iter() if session_of(process.pid) == session]
    return [process for process in {*family, *own} if process.is_running() and not is_zombie(process)]


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what may differ between equal runs: times, and how the actors fared."""
    return [
        {k: v for k, v in line.items() if not k.startswith("seconds_") and k not in ("restarts", "samplers")}
        for line in metrics_of(folder)
    ]


def ledger_of(folder: Path, *drop: str) -> pa.Table:
    """The ledger without times (and some more columns)."""
    return read_ledger(folder / "ledger").drop_columns(["seconds", *drop])
