"""Runs that end early in every way a run can, and then end as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tests.cluster.service import Service, ledger_of, prepare, services, timeless

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, STOP, EVERY = 20, 7, 7
FLAGS = f"""
--groups_per_step 2 --selection.candidates 4 --selection.keep 2 --eval_every 10 --eval_samples 1
--image_every 100 --checkpoint_every {EVERY} --keep_checkpoints 3 --rollout.steps 3 --rollout.eval_steps 2
--learner.threads 2 --learner.ema_every 2 --cluster.object_store_gb 0.2
""".split()

Start = Callable[..., Service]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Iterator[Start]:
    home = tmp_path_factory.mktemp("resume")
    inputs = prepare(home, pipeline_folder)
    with services() as started:

        def begin(name: str, *flags: str, steps: int = STEPS, resume: bool = False) -> Service:
            folder = home / name
            arguments = ["--resume", str(folder), "--steps", str(STEPS)]
            if not resume:
                arguments = ["shapes", *FLAGS, *inputs, "--folder", str(folder), "--steps", str(steps)]
            return started([*arguments, *flags], folder)

        yield begin


@pytest.fixture(scope="module")
def finished(start: Start) -> Service:
    service = start("reference")
    assert service.finish() == 0, service.output
    return service


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without the evaluation that a run of 7 steps ends with and one of 20 does not have."""
    return [
        {k: v for k, v in line.items() if line["step"] != STOP or not k.startswith("eval_")}
        for line in timeless(folder)
    ]


def same_run(found: Path, expected: Path) -> None:
    assert lines(found) == lines(expected)
    assert ledger_of(found) == ledger_of(expected)
    for name in ("weights.safetensors", "average.safetensors"):
        one, other = (load_file(folder / f"checkpoints/step-{STEPS}" / name) for folder in (found, expected))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_after_a_normal_end(start: Start, finished: Service) -> None:
    assert start("normal", steps=STOP).finish() == 0
    service = start("normal", resume=True)
    assert service.finish() == 0, service.output
    same_run(service.folder, finished.folder)


def test_after_ctrl_c(start: Start, finished: Service) -> None:
    service = start("interrupted")
    service.wait_for_step(STOP)
    service.interrupt()
    assert service.finish() == 130, service.output
    service = start("interrupted", resume=True)
    assert service.finish() == 0, service.output
    same_run(service.folder, finished.folder)


def kill(service: Service) -> None:
    """SIGKILL to the driver and to everything that it has started."""
    family = service.family()
    os.kill(service.process.pid, signal.SIGKILL)
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=20)
    service.process.wait()


def test_after_sigkill_while_saving(start: Start, finished: Service) -> None:
    service = start("killed")
    half = service.folder / f"checkpoints/step-{2 * EVERY}"
    service.wait_until(lambda: half.exists() and any(half.iterdir()))
    kill(service)
    assert not (half / "COMMITTED").exists()
    service = start("killed", resume=True)
    assert service.finish() == 0, service.output
    same_run(service.folder, finished.folder)


def test_by_two_ranks_what_one_has_begun(start: Start, finished: Service) -> None:
    assert start("wider", steps=STOP).finish() == 0
    service = start("wider", "--learner.ranks", "2", "--learner.threads", "1", resume=True)
    assert service.finish() == 0, service.output
    found, expected = lines(service.folder), lines(finished.folder)
    assert found[: STOP + 1] == expected[: STOP + 1]
    first, then = found[STOP + 1], expected[STOP + 1]
    assert first["reward_mean"] == then["reward_mean"]  # sampled with the same weights
    assert first["loss"] == pytest.approx(then["loss"], abs=1e-6)  # advantages of about one nearly cancel
    assert first["grad_norm"] == pytest.approx(then["grad_norm"], rel=1e-4)
