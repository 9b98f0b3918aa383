"""Checks of the service on one machine: shares of a GPU, ZeRO, a killed sampler, and an exact resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil

from cluster.actors.actor_spec import role_of
from cluster.bench.gpu.check import Setup, SkippedError
from cluster.bench.gpu.right import Sampled, learner_settings, tiny_subject
from cluster.bench.subject import learner_of, requests, sampler_of
from cluster.bench.table import Measurement
from cluster.config.sources import read_toml
from cluster.record.json_lines import complete_lines
from cluster.record.names import CHECKPOINTS, METRICS, STAGES

ENGINES: Final[dict[str, dict[str, Any]]] = {
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "ZeRO 1, optimizer on the CPU": {"zero_stage": 1, "offload": "optimizer"},
    "ZeRO 3, parameters on the CPU": {"zero_stage": 3, "offload": "parameters"},
}
SMALL: Final = """
--groups_per_step 2 --selection.candidates 8 --selection.keep 4 --eval_samples 1 --rollout.steps 4
--rollout.eval_steps 4 --cluster.object_store_gb 0.5 --image_every 100 --guard.action off
""".split()
"""A run of the bundled tasks that takes a second per step."""


def engines(setup: Setup) -> Iterator[Measurement]:
    """Train the same candidates under every stage of ZeRO, whose losses must be equal."""
    one = tiny_subject(setup, "sd3", setup.device)
    work = Sampled.by(sampler_of(one), requests(one, 2)).work
    losses: dict[str, float] = {}
    for name, engine in ENGINES.items():
        learner = learner_of(one, learner_settings(one, **{"learning_rate": 1e-3, **engine}))
        for _ in range(2):
            losses[name] = learner.update(work).metrics["loss"]
        apart = abs(losses[name] - losses["ZeRO 0"])
        yield Measurement(f"{name}: loss of the second update, apart from ZeRO 0", [apart], 9, most=1e-6)


def service(setup: Setup) -> Iterator[Measurement]:
    """Train `shapes` with shares of the device; kill a sampler; resume from a checkpoint."""
    run = setup.folder / "run"
    flags = [*SMALL, "--steps", "6", "--checkpoint_every", "3", "--keep_checkpoints", "2", *_shares(setup)]
    with _training(run, ["shapes", *flags]) as started:
        _wait_for_step(run, started, 1)
        _kill(started, "rollout")
        _ended(started, run)
    steps = metrics_of(run)
    yield Measurement("steps done with a sampler killed", [steps[-1]["step"]], 0, least=6, most=6)
    yield Measurement("samplers restarted", [steps[-1]["restarts"]], 0, least=1)
    yield Measurement(
        "largest ratio deviation", [max(s["ratio_max_deviation"] for s in steps[1:])], 7, most=1e-4
    )
    yield from _stages("shapes", steps)
    again = shutil.copytree(run, setup.folder / "again")
    shutil.rmtree(again / CHECKPOINTS / f"step-{steps[-1]['step']}")
    with _training(again, ["--resume", str(again)]) as resumed:
        _ended(resumed, again)
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(steps[1:], metrics_of(again)[1:], strict=True)]
    yield Measurement("losses of a run resumed at step 3, apart", [max(apart)], 9, most=0)


def task(setup: Setup, name: str, *more: str) -> Iterator[Measurement]:
    """Train a bundled task for two steps, with the real reward."""
    if not setup.gpus:
        raise SkippedError("for GPUs; on CPUs it is like the service with shapes")
    run = setup.folder / name
    with _training(run, [name, *SMALL, "--steps", "2", *_shares(setup), *more]) as started:
        _ended(started, run)
    steps = metrics_of(run)
    yield Measurement(f"{name}: mean reward", [steps[-1]["reward_mean"]], 3)
    yield from _stages(name, steps)


def words(setup: Setup) -> Iterator[Measurement]:
    """Train the bundled model of words, with OCR."""
    yield from task(setup, "words")


def preference(setup: Setup) -> Iterator[Measurement]:
    """Train the bundled task of preference, with CLIP on the device."""
    rewards = [{**reward, "gpus": 0.1} for reward in read_toml("preference")["rewards"]]
    yield from task(setup, "preference", "--rewards", json.dumps(rewards))


def _shares(setup: Setup) -> list[str]:
    """Return the flags with which learner and two samplers share the device."""
    sampler, learner = ("0.2", "0.4") if setup.gpus else ("0", "0")
    return ["--rollout.gpus", sampler, "--learner.gpus", learner, "--rollout.workers", "2"]


@contextmanager
def _training(run: Path, arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run as a user does; its output goes to a file beside its folder."""
    where = [] if "--resume" in arguments else ["--folder", str(run)]
    command = [sys.executable, "-m", "cluster", "train", *arguments, *where]
    with run.with_suffix(".log").open("ab") as output:
        started = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def _ended(started: subprocess.Popen[bytes], run: Path) -> None:
    """Wait until a run has ended well.

    Raises:
        RuntimeError: with its last lines, if it failed.
    """
    if started.wait():
        lines = run.with_suffix(".log").read_text(encoding="utf-8").splitlines()
        raise RuntimeError(f"status {started.returncode}:\n" + "\n".join(lines[-10:]))


def _wait_for_step(run: Path, started: subprocess.Popen[bytes], step: int) -> None:
    while started.poll() is None and not any(line["step"] >= step for line in metrics_of(run)):
        time.sleep(0.1)


def _kill(started: subprocess.Popen[bytes], role: str) -> None:
    """Kill the first actor of a role, as running out of memory would."""
    for process in psutil.Process(started.pid).children(recursive=True):
        if role_of(process) == role:
            process.kill()
            return
    raise RuntimeError(f"no actor of the role {role}")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run so far, a line per step."""
    path = run / METRICS
    return complete_lines(path.read_bytes())[0] if path.exists() else []


def _stages(name: str, steps: Sequence[dict[str, Any]]) -> Iterator[Measurement]:
    """Yield the seconds of every stage, without those of the first step, which loads kernels."""
    late = steps[2:] or steps[1:]
    for stage in (*STAGES, "step"):
        yield Measurement(f"{name}: {stage} (s)", [step[f"seconds_{stage}"] for step in late], 3)
