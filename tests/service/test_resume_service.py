"""Runs that are stopped or lose processes or files: all end as undisturbed ones."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cluster.record.checkpoints import Checkpoints
from tests.support.saving import flip
from tests.support.service_process import REWARDS, Service, ledger_of, metrics_of, prepare, services, timeless

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, STOP, EVERY = 20, 7, 7
FLAGS = f"""
--groups_per_step 2 --selection.candidates 4 --selection.keep 2 --eval_every 10 --eval_samples 1
--image_every 100 --checkpoint_every {EVERY} --keep_checkpoints 3 --rollout.steps 3 --rollout.eval_steps 2
--learner.threads 2 --learner.ema_every 2 --cluster.object_store_gb 0.2
""".split()

TWO = ["--learner.ranks", "2", "--learner.threads", "1"]

Start = Callable[..., Service]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Iterator[Start]:
    home = tmp_path_factory.mktemp("resume")
    inputs = prepare(home, pipeline_folder, [{**reward, "deadline": 20} for reward in REWARDS])
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
    """Return the metrics without the final evaluation of a run of 7 steps, which one of 20 does not have."""
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


def test_after_sigkill_while_saving(start: Start, finished: Service) -> None:
    service = start("killed")
    half = service.folder / f"checkpoints/step-{2 * EVERY}"
    service.wait_until(lambda: half.exists() and any(half.iterdir()))
    service.kill()
    assert not (half / "COMMITTED").exists()
    service = start("killed", resume=True)
    assert service.finish() == 0, service.output
    same_run(service.folder, finished.folder)


def test_actors_that_die_or_hang(start: Start, finished: Service) -> None:
    service = start("harried", "--cluster.deadline", "10")
    for step, role in ((1, "rollout"), (4, "shapes"), (8, "selector")):
        service.wait_for_step(step)
        service.actors(role)[0].kill()
        service.wait_for_step(step + 1)
        service.actors(role)[0].suspend()
    assert service.finish() == 0, service.output
    assert metrics_of(service.folder)[-1]["restarts"] >= 6
    same_run(service.folder, finished.folder)


@pytest.fixture(scope="module")
def pair(start: Start) -> Service:
    """The undisturbed run with two learner ranks."""
    service = start("pair", *TWO)
    assert service.finish() == 0, service.output
    return service


def test_a_learner_rank_that_dies_and_one_that_hangs(start: Start, pair: Service) -> None:
    service = start("widowed", *TWO, "--cluster.learner_deadline", "30")
    service.wait_for_step(3)
    service.actors("learner")[-1].kill()
    service.wait_until(lambda: "all ranks restart from step 0" in service.output)
    service.wait_for_step(EVERY + 2)
    service.actors("learner")[0].suspend()
    service.wait_until(lambda: f"all ranks restart from step {EVERY}" in service.output)
    assert service.finish() == 0, service.output
    assert "Traceback" not in service.output
    assert metrics_of(service.folder)[-1]["restarts"] == 4
    same_run(service.folder, pair.folder)


def test_the_run_folder_is_lost_and_checkpoints_are_elsewhere(
    start: Start, finished: Service, tmp_path: Path
) -> None:
    elsewhere = ["--checkpoints", (tmp_path / "elsewhere").as_uri(), "--auto-resume"]
    service = start("lost", *elsewhere, steps=STOP)
    assert service.finish() == 0, service.output
    shutil.rmtree(service.folder)
    service = start("lost", *elsewhere)
    assert service.finish() == 0, service.output
    assert lines(service.folder) == lines(finished.folder)
    assert (service.folder / "report.html").exists()


def test_a_bit_of_the_newest_checkpoint_is_flipped(start: Start, finished: Service) -> None:
    service = start("flipped", steps=2 * EVERY)
    assert service.finish() == 0, service.output
    flip(Checkpoints(str(service.folder / "checkpoints"), 3), 2 * EVERY, "weights.safetensors", bit=8 * 9999)
    service = start("flipped", resume=True)
    assert service.finish() == 0, service.output
    assert "damaged, so an older checkpoint is used: " in service.output
    same_run(service.folder, finished.folder)


def test_a_folder_that_the_ranks_do_not_share(start: Start) -> None:
    service = start("apart", "--checkpoints", "memory://apart", "--steps", "1")  # every process has its own
    assert service.finish() == 1, service.output
    (line,) = [line for line in service.output.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: checkpoint memory:///apart/step-1: ")
    assert "all nodes must share this folder" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which root may mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", folder], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_while_saving(start: Start, finished: Service, small_disk: Path) -> None:
    url = ["--checkpoints", str(small_disk / "checkpoints")]
    service = start("full", *url)
    service.wait_until((small_disk / f"checkpoints/step-{EVERY}/COMMITTED").exists)
    with (small_disk / "filler").open("wb") as filler, suppress(OSError):
        while True:
            filler.write(bytes(1 << 16))
    assert service.finish() == 1, service.output
    (line,) = [line for line in service.output.splitlines() if line.startswith("failed: ")]
    assert line.startswith(
        f"failed: checkpoint file://{small_disk}/checkpoints/step-{2 * EVERY} could not be"
    )
    assert line.endswith(f" (0.00 GB are free there); --resume continues from step {EVERY}")
    assert "Traceback" not in service.output
    (small_disk / "filler").unlink()
    service = start("full", *url, resume=True)
    assert service.finish() == 0, service.output
    shutil.copytree(small_disk / "checkpoints", service.folder / "checkpoints")
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
