"""The service on every push: a job. `tests/cluster/bench/test_gpu_whole.py` has a run that fails and goes on.

The other tests of this folder say the same at length, and take more than a minute each.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.raylets import raylets
from tests.support.service_process import ledger_of, metrics_of, prepare

pytestmark = pytest.mark.ray

STEPS = 3
FLAGS = f"""
--steps {STEPS} --groups_per_step 2 --selection.candidates 4 --selection.keep 2 --eval_every {STEPS}
--eval_samples 1 --checkpoint_every 1 --rollout.steps 3 --rollout.eval_steps 2 --rollout.workers 1
--learner.threads 1 --guard.action off --cluster.object_store_gb 0.2
""".split()
REWARDS = [{"name": "jpeg"}]  # a random model never draws a shape, so that nothing would be learned


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> list[str]:
    return prepare(tmp_path_factory.mktemp("inputs"), pipeline_folder, REWARDS)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, inputs: list[str]) -> Path:
    """Run a job to its end, and return its run folder."""
    folder = tmp_path_factory.mktemp("service") / "job"
    with raylets(1) as cluster:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.submit", "shapes", *FLAGS, *inputs, "--name", "job", "--follow",
             "--folder", str(folder), "--address", cluster.address],
            cwd=ROOT, env=cluster.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_job_trains_and_leaves_its_record(job: Path) -> None:
    assert [line["step"] for line in metrics_of(job)] == list(range(STEPS + 1))
    assert metrics_of(job)[-1]["updates"] > 0
    assert len(ledger_of(job)) == STEPS * 2 * 4
    assert (job / f"checkpoints/step-{STEPS}/COMMITTED").is_file()
    assert "<html" in (job / "report.html").read_text(encoding="utf-8")
