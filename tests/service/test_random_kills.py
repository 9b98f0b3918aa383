"""SIGKILL of the driver, the learner or everything at random times: the same final run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.service_process import Service, ledger_of, metrics_of, prepare, services, timeless

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, MOMENTS = 16, 5
LEAN = [{"name": "jpeg"}]
"""The flags of a run with few processes, since most of the time is spent in starts."""
FLAGS = f"""
--steps {STEPS} --groups_per_step 2 --selection.candidates 4 --selection.keep 2 --eval_every 8
--eval_samples 1 --image_every 100 --checkpoint_every 5 --keep_checkpoints 2 --rollout.steps 3
--rollout.eval_steps 2 --learner.threads 2 --learner.ema_every 2 --cluster.object_store_gb 0.2
--rollout.workers 1 --guard.action off --auto-resume
""".split()

Start = Callable[[str], Service]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Iterator[Start]:
    home = tmp_path_factory.mktemp("kills")
    inputs = prepare(home, pipeline_folder, LEAN)
    with services() as started:
        yield lambda name: started(["shapes", *FLAGS, *inputs, "--folder", str(home / name)], home / name)


@pytest.fixture(scope="module")
def finished(start: Start) -> Service:
    service = start("reference")
    assert service.finish() == 0, service.output
    return service


def kill_driver(service: Service) -> None:
    os.kill(service.process.pid, signal.SIGKILL)


def kill_learner(service: Service) -> None:
    service.actors("learner")[0].kill()


def kill_everything(service: Service) -> None:
    service.kill()


def at_a_random_moment(service: Service, chance: random.Random, finished: Service) -> str:
    """Wait until a random time within a random step but the last, and return the step."""
    step = chance.randrange(STEPS - 1)
    service.wait_for_step(step)
    seconds = chance.random() * metrics_of(finished.folder)[step + 1]["seconds_step"]
    time.sleep(seconds)
    return f"{step}+{seconds:.2f}s"


@pytest.mark.parametrize("kill", [kill_everything, kill_learner, kill_driver])
def test_a_kill_at_a_random_moment_leaves_no_trace(
    start: Start, finished: Service, kill: Callable[[Service], None]
) -> None:
    chance, moments = random.Random(kill.__name__), []
    for number in range(MOMENTS):
        name = f"{kill.__name__}-{number}"
        service = start(name)
        moments.append(at_a_random_moment(service, chance, finished))
        kill(service)
        if kill is kill_learner:
            assert service.finish() == 0, service.output
        else:
            service.process.wait()
            service = start(name)
            assert service.finish() == 0, service.output
        assert timeless(service.folder) == timeless(finished.folder), moments
        assert ledger_of(service.folder) == ledger_of(finished.folder), moments
        assert same_weights(service.folder, finished.folder), moments
    print(f"\n{kill.__name__}: equal after kills at steps {', '.join(moments)}")


def same_weights(found: Path, expected: Path) -> bool:
    names = ("weights.safetensors", "average.safetensors")
    files = [[load_file(path / f"checkpoints/step-{STEPS}" / n) for n in names] for path in (found, expected)]
    return all(
        one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
        for one, other in zip(*files, strict=True)
    )
