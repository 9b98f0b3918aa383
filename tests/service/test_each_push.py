"""The service on every push: a run as a user starts it, one that is killed and goes on, and one as a job.

The other tests of this folder say the same at length, and take more than a minute each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ROOT
from tests.support.raylets import raylets
from tests.support.service_process import Service, ledger_of, metrics_of, prepare, services, timeless

pytestmark = pytest.mark.ray

STEPS = 3
FLAGS = f"""
--steps {STEPS} --groups_per_step 2 --selection.candidates 4 --selection.keep 2 --eval_every {STEPS}
--eval_samples 1 --checkpoint_every 1 --rollout.steps 3 --rollout.eval_steps 2 --rollout.workers 1
--learner.threads 1 --guard.action off --cluster.object_store_gb 0.2
""".split()
REWARDS = [{"name": "shapes"}]

Start = Callable[..., Service]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> list[str]:
    return prepare(tmp_path_factory.mktemp("inputs"), pipeline_folder, REWARDS)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, inputs: list[str]) -> Iterator[Start]:
    home = tmp_path_factory.mktemp("service")
    with services() as started:

        def begin(name: str, *flags: str) -> Service:
            folder = home / name
            return started(["shapes", *FLAGS, *inputs, "--folder", str(folder), *flags], folder)

        yield begin


@pytest.fixture(scope="module")
def finished(start: Start) -> Service:
    service = start("whole")
    assert service.finish() == 0, service.output
    return service


def test_a_run_trains_and_leaves_its_record(finished: Service) -> None:
    assert [line["step"] for line in metrics_of(finished.folder)] == list(range(STEPS + 1))
    assert metrics_of(finished.folder)[-1]["updates"] > 0
    assert len(ledger_of(finished.folder)) == STEPS * 2 * 4
    assert (finished.folder / f"checkpoints/step-{STEPS}/COMMITTED").is_file()
    assert "<html" in (finished.folder / "report.html").read_text(encoding="utf-8")


def test_a_run_that_is_killed_goes_on_as_if_it_were_not(start: Start, finished: Service) -> None:
    service = start("killed", "--auto-resume")
    marker = service.folder / "checkpoints/step-1/COMMITTED"
    service.wait_until(marker.exists)
    family = service.family()
    os.kill(service.process.pid, signal.SIGKILL)
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=20)
    service.process.wait()
    service = start("killed", "--auto-resume")
    assert service.finish() == 0, service.output
    assert timeless(service.folder) == timeless(finished.folder)
    assert ledger_of(service.folder) == ledger_of(finished.folder)


def test_a_job_trains_on_a_cluster(tmp_path: Path, inputs: list[str], finished: Service) -> None:
    folder = tmp_path / "job"
    with raylets(1) as cluster:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.submit", "shapes", *FLAGS, *inputs, "--name", "job", "--follow",
             "--folder", str(folder), "--address", cluster.address],
            cwd=ROOT, env=cluster.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert timeless(folder) == timeless(finished.folder)
