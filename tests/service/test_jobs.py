"""Jobs on a cluster of real nodes with a token, as a user submits, watches, stops and continues them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.raylets import RAY, Raylets, raylets
from tests.support.service_process import FLAGS, ROOT, metrics_of, prepare

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Done = subprocess.CompletedProcess[str]
LONG = 24
"""Steps of the run whose status is read while it works."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """A head without CPUs and two workers."""
    with raylets(2) as started:
        yield started


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def flags(home: Path, pipeline_folder: Path) -> list[str]:
    """The flags of a small run with two samplers and three reward replicas."""
    return ["shapes", *FLAGS, *prepare(home, pipeline_folder)]


def run(cluster: Raylets, *command: str, cwd: Path = ROOT, **environment: str) -> Done:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**cluster.environment, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def submit(cluster: Raylets, *arguments: str, **environment: str) -> Done:
    command = (sys.executable, "-m", "cluster.submit", *arguments, "--address", cluster.address)
    return run(cluster, *command, **environment)


def job(cluster: Raylets, verb: str, *arguments: str) -> Done:
    return run(cluster, RAY, "job", verb, "--address", cluster.address, *arguments)


def wait(happened: Callable[[], bool], story: Callable[[], str], timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, story()
        time.sleep(0.5)


def seen(cluster: Raylets, name: str) -> dict[str, str]:
    """The nodes of a run's samplers, once all are up."""
    found: dict[str, str] = {}

    def up() -> bool:
        found.update({k: v for k, v in cluster.actors().items() if k.startswith("rollout-")})
        return len(found) == 2

    wait(up, lambda: job(cluster, "logs", name).stdout)
    return found


@pytest.fixture(scope="module")
def finished(cluster: Raylets, home: Path, flags: list[str]) -> tuple[Path, dict[str, str], str]:
    """A run started by `ray job submit` from a fresh clone: its folder, its samplers' nodes, a status."""
    clone, folder = home / "clone", home / "bar"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    long = [*flags]
    long[long.index("--steps") + 1] = str(LONG)
    command = ["python", "-m", "cluster.train", *long, "--folder", str(folder), "--auto-resume"]
    sent = run(
        cluster, RAY, "job", "submit", "--address", cluster.address, "--submission-id", "bar", "--no-wait",
        "--working-dir", ".", "--", *command, cwd=clone,
    )  # fmt: skip
    assert sent.returncode == 0, sent.stdout + sent.stderr
    nodes = seen(cluster, "bar")
    said: list[str] = []

    def told(*signs: str) -> bool:
        said.append(job(cluster, "status", "bar").stdout)
        return any(sign in said[-1] for sign in signs)

    wait(lambda: told(f"/{LONG}, reward ", "succeeded", "failed"), lambda: said[-1])
    midway = said[-1]
    wait(lambda: told("succeeded", "failed"), lambda: said[-1])
    return folder, nodes, midway


def test_ray_job_submit_from_a_fresh_clone(
    cluster: Raylets, finished: tuple[Path, dict[str, str], str]
) -> None:
    folder, nodes, midway = finished
    shown = job(cluster, "logs", "bar").stdout
    assert "succeeded" in job(cluster, "status", "bar").stdout, shown
    assert [line["step"] for line in metrics_of(folder)] == list(range(LONG + 1))
    assert len(set(nodes.values())) == 2
    assert f"/{LONG}, reward " in midway
    assert f"folder {folder}" in midway


def test_what_is_said_of_a_finished_job(cluster: Raylets, finished: tuple[Path, dict[str, str], str]) -> None:
    folder, _, _ = finished
    said = submit(cluster, "status", "bar").stdout
    assert "state       SUCCEEDED" in said
    assert "exit status 0" in said
    assert f"step        {LONG}/{LONG}" in said
    assert f"checkpoint  {LONG}" in said
    assert f"folder      {folder}" in said
    reward = f"{metrics_of(folder)[-1]['reward_mean']:.4g}"
    assert f"reward      {reward}" in said
    assert reward in submit(cluster, "list").stdout
    assert f"step {LONG}/{LONG}" in submit(cluster, "logs", "bar").stdout
    shown = run(cluster, sys.executable, "-m", "cluster.watch", str(folder)).stdout
    assert "bar  finished" in shown


def test_the_token_is_nowhere(cluster: Raylets, finished: tuple[Path, dict[str, str], str]) -> None:
    secret = cluster.token.encode()
    assert not [path for path in finished[0].rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert cluster.token not in job(cluster, "logs", "bar").stdout
    assert cluster.token not in cluster.get("/api/jobs/").text


def test_nobody_gets_in_without_the_token(cluster: Raylets, flags: list[str], tmp_path: Path) -> None:
    assert httpx.get(f"{cluster.address}/api/version").status_code == 401
    sent = httpx.post(f"{cluster.address}/api/jobs/", json={"entrypoint": "true"})
    assert sent.status_code == 401
    anonymous = {"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    refused = submit(cluster, *flags, "--name", "nobody", **anonymous)
    assert refused.returncode == 2
    assert "error: the cluster requires a token, and ~/.ray/auth_token cannot be read" in refused.stderr
    wrong = submit(cluster, *flags, "--name", "nobody", RAY_AUTH_TOKEN="another")
    assert wrong.returncode == 2
    assert f"error: RAY_AUTH_TOKEN: {cluster.address} refuses this token" in wrong.stderr
    outside = run(
        cluster, RAY, "job", "list", "--address", cluster.address, **anonymous, RAY_AUTH_MODE="disabled"
    )
    assert outside.returncode != 0
    assert "nobody" not in cluster.get("/api/jobs/").text


def test_a_stopped_job_commits_a_checkpoint_and_is_continued(
    cluster: Raylets, home: Path, flags: list[str]
) -> None:
    folder = home / "halted"
    long = ["--selection.candidates", "96", "--groups_per_step", "4", "--checkpoint_every", "1000"]
    named = [*flags, *long, "--name", "halted", "--folder", str(folder)]
    sent = submit(cluster, *named, "--steps", "1000")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert "submitted halted, run folder" in sent.stdout
    metrics = folder / "metrics.jsonl"
    wait(
        lambda: metrics.exists() and '"step": 1,' in metrics.read_text(),
        lambda: job(cluster, "logs", "halted").stdout,
    )
    again = submit(cluster, *named)
    assert again.returncode == 2
    assert "error: --name: halted is RUNNING in folder" in again.stderr
    stopped = submit(cluster, "stop", "halted")
    last = metrics_of(folder)[-1]
    assert last["seconds_step"] > 3, "steps must outlast Ray's own limit, or this test shows nothing"
    assert f"halted stopped, step {last['step']}/1000" in stopped.stdout, stopped.stdout + stopped.stderr
    assert f"checkpoint {last['step']}," in stopped.stdout
    assert [path.parent.name for path in folder.glob("checkpoints/*/COMMITTED")] == [f"step-{last['step']}"]
    continued = submit(cluster, *named, "--steps", str(last["step"] + 1), "--follow")
    assert continued.returncode == 0, continued.stdout + continued.stderr
    assert "submitted halted-2, run folder" in continued.stdout
    assert metrics_of(folder)[-1]["step"] == last["step"] + 1
    events = (folder / "log.jsonl").read_text()
    assert events.count("run started") == 2
    assert "stop asked for" in events


def test_a_run_without_room_fails_with_the_arithmetic(cluster: Raylets, home: Path, flags: list[str]) -> None:
    greedy = ["--rollout.gpus", "1", "--cluster.wait", "4", "--folder", str(home / "greedy")]
    done = submit(cluster, *flags, *greedy, "--name", "greedy", "--follow")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "waiting up to 4 s for resources: " in done.stdout
    told = (
        "error: the cluster lacks resources for the run after 4 s: "
        "GPUs: 2 needed (rollout 2 x 1), 0 available"
    )
    assert told in done.stdout
    assert told in job(cluster, "status", "greedy").stdout
