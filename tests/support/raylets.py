"""A Ray cluster of several nodes on this machine, each a real raylet of `ray start`, with a token."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support.ports import free_port

RAY = str(Path(sys.executable).parent / "ray")
LEFT_OUT = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


@dataclass
class Raylets:
    """A head, which runs no actor, and workers; ``environment`` is that of somebody who has the token."""

    address: str
    token: str
    environment: dict[str, str]
    home: Path
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *flags: str) -> subprocess.Popen[bytes]:
        """Start a node; its output is kept beside the others' for a look."""
        command = [
            RAY, "start", "--block", "--disable-usage-stats", "--object-store-memory=200000000",
            f"--dashboard-agent-listen-port={free_port()}", *flags,
        ]  # fmt: skip
        with (self.home / f"{name}.log").open("wb") as output:
            node = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
        self.nodes.append(node)
        return node

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Ask the dashboard, with the token unless another header is given."""
        return httpx.get(
            f"{self.address}{path}", headers=headers or {"Authorization": f"Bearer {self.token}"}
        )

    def alive(self) -> int:
        """How many nodes the head knows and believes alive."""
        with suppress(httpx.HTTPError):
            answer = self.get("/api/v0/nodes")
            if answer.status_code == httpx.codes.OK:
                found = answer.json()["data"]["result"]["result"]
                return sum(node["state"] == "ALIVE" for node in found)
        return 0

    def actors(self) -> dict[str, str]:
        """The node of every living actor of a run, by the actor's name."""
        answer: dict[str, Any] = self.get("/api/v0/actors?detail=True").json()
        return {
            actor["repr_name"]: actor["node_id"]
            for actor in answer["data"]["result"]["result"]
            if actor["state"] == "ALIVE" and actor["class_name"] == "WorkerActor"
        }

    def wait_for(self, count: int, timeout: float = 90) -> None:
        """Wait until that many nodes are up."""
        deadline = time.monotonic() + timeout
        while self.alive() < count:
            logs = "\n".join(path.read_text() for path in self.home.glob("*.log"))
            assert time.monotonic() < deadline, f"{self.alive()} of {count} nodes after {timeout} s:\n{logs}"
            time.sleep(0.5)

    def end(self) -> None:
        """Kill every process that this cluster has started, and no other."""
        family: list[psutil.Process] = []
        for node in self.nodes:
            with suppress(psutil.NoSuchProcess):
                family += [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self.nodes:
            node.wait()
        psutil.wait_procs(family, timeout=10)


@contextmanager
def raylets(workers: int, *, token: str = "only-for-this-test", cpus: int = 1) -> Iterator[Raylets]:
    """A head without CPUs and some workers with some each."""
    home = Path(tempfile.mkdtemp(prefix="nm-", dir="/tmp"))  # short, since sockets lie below it
    port, dashboard = free_port(), free_port()
    kept = {key: value for key, value in os.environ.items() if key not in LEFT_OUT}
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job's command is `python`
    environment = {**kept, **secret, "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    started = Raylets(f"http://127.0.0.1:{dashboard}", token, environment, home)
    try:
        started.start(
            "head", "--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={home / 'head'}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        )  # fmt: skip
        started.wait_for(1)
        for number in range(workers):
            # What separate machines have by themselves: ports, and a folder for the code of jobs.
            first, name = 20000 + 500 * number, f"worker-{number}"
            started.start(
                name, f"--address=127.0.0.1:{port}", f"--num-cpus={cpus}", f"--temp-dir={home / name}",
                f"--min-worker-port={first}", f"--max-worker-port={first + 499}",
            )  # fmt: skip
            started.wait_for(2 + number)  # one after the other: on one machine they choose names of sockets
        yield started
    finally:
        started.end()
        shutil.rmtree(home, ignore_errors=True)
