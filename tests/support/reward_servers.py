"""Reward servers as a user starts them, and the scorers of a user's own that they serve."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.paths import ROOT

OWN = '''
import os
import threading
import time

import numpy as np

from rewards.scorer import Judgement, Traits


class Echo:
    """Says what it was given; prompts tell it what to do."""

    traits = Traits(low=0.0, high=1.0)

    def __init__(self, wait=0.0):
        time.sleep(wait)
        self.inside = 0

    def __call__(self, images, prompts):
        self.inside += 1
        time.sleep(prompts[0].metadata.get("sleep", 0.0))
        alone = self.inside == 1
        self.inside -= 1
        if prompts[0].text == "fail":
            raise ZeroDivisionError("by hand")
        values = np.array([p.metadata.get("value", 0.5) for p in prompts], dtype=float)
        details = {
            "text": np.array([p.text for p in prompts]),
            "seen": np.array([repr(p.metadata) for p in prompts]),
            "index": np.array([p.index for p in prompts]),
            "alone": np.full(len(prompts), alone),
            "level": np.array([np.nan if p.text == "nan" else 0.25 for p in prompts]),
        }
        if prompts[0].text == "odd":
            details["odd"] = np.array([object()] * len(prompts))
        valid = np.array([p.text != "invalid" for p in prompts])
        values[[p.text == "nan" for p in prompts]] = np.nan
        return Judgement(values=values, valid=valid, details=details)

    @classmethod
    def check(cls, prompt):
        """Every prompt will do."""


class Groups(Echo):
    traits = Traits(low=0.0, high=1.0, groupwise=True)
'''


def environment(own: Path | None = None, **variables: str) -> dict[str, str]:
    """The environment of a process that finds the modules in a folder."""
    paths = {"PYTHONPATH": str(own)} if own else {}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", **paths, **variables}


@contextmanager
def served(*arguments: str, own: Path | None = None, **variables: str) -> Iterator[Server]:
    """``python -m rewards.serve`` on a free port, ready unless told to wait, ended by SIGTERM."""
    server = Server(*arguments, own=own, **variables)
    try:
        if not any(argument.startswith("wait=") for argument in arguments):
            server.wait_until_ready()
        yield server
    finally:
        server.end()


class Server:
    """One process and its address; ``log`` are the lines it wrote to standard error after its end."""

    def __init__(self, *arguments: str, own: Path | None = None, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rewards.serve", *arguments, "--port", "0"],
            cwd=ROOT, env=environment(own, **variables), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = next((word for word in line.split() if word.startswith("http://")), "")

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while httpx.get(f"{self.url}/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> int:
        """Ask it to end; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.log = self.process.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode
