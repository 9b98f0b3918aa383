"""A run folder that is lost while the checkpoints are elsewhere: the run goes on as if it were not."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.actors.learner import LearnerLost
from cluster.loop import recovery
from cluster.loop.drift_guard import guard_of
from cluster.loop.evaluation import held_out
from cluster.loop.loop import Run, _conclude, _evaluation
from cluster.loop.recovery import train_through_losses
from cluster.loop.resume import announce, started_before
from cluster.record.checkpoints import Checkpoints, checkpoints_of
from cluster.record.events import NAME, recording
from cluster.record.marker import MARKER
from cluster.record.run_folder import RunFolder
from rewards.combine import Scores
from rollout.records import Prompt
from tests.support.saving import SavingLearner

STEPS, EVERY, LOST = 12, 3, 8
PROMPTS = tuple(Prompt(index=index, text=f"prompt {index}") for index in range(5))
START = np.array([0.1, 0.9, 0.5, 0.5, 0.2])


class Stand(SavingLearner):
    """Every stage; what held-out images score depends on the version of the weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts = self.rewards = self.learner = self

    def forget(self) -> None: ...

    def try_again(self) -> None: ...

    def alarms(self) -> dict[str, str]:
        return {}

    async def publish(self, version: int, *, averaged: bool = False) -> int:
        return version

    async def evaluate(self, prompts: list[Prompt], noises: Any, version: int) -> Any:
        self.version = version

        async def images() -> Any:
            return np.zeros((len(prompts), 4, 4, 3), dtype=np.uint8)

        return [True] * len(prompts), images()

    async def judge(self, images: Any, prompts: list[Prompt], finite: list[bool]) -> Scores:
        chosen = [prompt.index for prompt in prompts]
        found = (START + self.version * np.array([0.02, -0.01, 0.03, 0.0, 0.1]))[chosen]
        watched = (1 - START * self.version / STEPS)[chosen]
        return Scores(
            rewards={"shapes": found, "jpeg": watched}, weights={"shapes": 1.0, "jpeg": 0.0},
            valid=np.isfinite(found), total=found, strict=None,
        )  # fmt: skip


@pytest.fixture
def settings(configure: Any, tmp_path: Path) -> Any:
    return configure(
        steps=STEPS, eval_every=EVERY, checkpoint_every=EVERY, eval_samples=1,
        checkpoints=(tmp_path / "elsewhere").as_uri(),
        eval_rewards=[{"name": "shapes"}, {"name": "jpeg", "weight": 0}],
        guard={"steps": 2, "change": 0.2, "sigmas": 1},
    )  # fmt: skip


def make(settings: Any, folder: RunFolder, checkpoints: Checkpoints, empty_batches: int = 0) -> Run:
    stages: Any = Stand()
    guard, drawn = guard_of(settings, folder.history()), held_out(PROMPTS, settings)
    run = Run(settings, folder, PROMPTS, drawn, stages, checkpoints, [folder.log], guard)
    run.empty_batches = empty_batches
    return run


async def go(run: Run, start: int, lost: Callable[[int], None] = lambda step: None) -> int:
    """The end of every step, without its sampling and learning; ``lost`` may break off before one."""
    if start == 0:
        metrics: dict[str, Any] = {"step": 0, **await _evaluation(run, 0)}
        run.guard.look(metrics)
        run.track(metrics)
    for step in range(start + 1, run.settings.steps + 1):
        lost(step)
        await _conclude(run, step, {"step": step, "image_edges": 1.0 if step < 7 else 0.1 * step})
    return run.settings.steps


def told(folder: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds_eval"} for line in folder.history()]


@pytest.fixture
def undisturbed(settings: Any, tmp_path: Path) -> list[dict[str, Any]]:
    folder = RunFolder(tmp_path / "undisturbed")
    folder.create(settings)
    checkpoints = Checkpoints(str(tmp_path / "undisturbed/checkpoints"), 2)
    asyncio.run(go(make(settings, folder, checkpoints), 0))
    lines = told(folder)
    alarms = {line["step"]: line["alarms"] for line in lines if "alarms" in line}
    assert alarms == {
        6: {"eval_jpeg": "fell from 1 to 0.78"},
        8: {"image_edges": "fell from 1 to 0.75"},
    }
    assert [line["eval_win_rate"] for line in lines if "eval_win_rate" in line] == [0.0, 0.6, 0.6, 0.6, 0.6]
    return lines


class Killed(Exception):
    """The driver is no more."""


def kill_at(step: int) -> Callable[[int], None]:
    def lost(now: int) -> None:
        if now == step:
            raise Killed

    return lost


def die(settings: Any, at: int) -> RunFolder:
    """A run that is killed before a step, and its folder with it."""
    folder = RunFolder(settings.folder)
    folder.create(settings)
    with pytest.raises(Killed):
        asyncio.run(go(make(settings, folder, checkpoints_of(settings, folder)), 0, kill_at(at)))
    shutil.rmtree(folder.path)
    return folder


@pytest.mark.parametrize("at", [LOST, 5])
def test_an_attempt_after_the_folder_is_lost_ends_as_if_it_were_not(
    settings: Any, undisturbed: list[dict[str, Any]], at: int
) -> None:
    folder = die(settings, at)
    checkpoints = checkpoints_of(settings, folder)
    found = started_before(settings, folder, checkpoints)
    assert found is not None
    assert found.step == (at - 1) // EVERY * EVERY
    said: list[str] = []
    announce(found, folder, checkpoints, said.append)
    assert said == []
    asyncio.run(go(make(settings, folder, checkpoints, found.empty_batches), found.step))
    assert told(folder) == undisturbed


def test_a_loss_of_ranks_and_folder_within_the_run(
    settings: Any, undisturbed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(settings.folder)
    folder.create(settings)
    pending = [LOST]

    async def train(run: Run, start: int) -> int:
        def lost(step: int) -> None:
            if pending == [step]:
                pending.clear()
                shutil.rmtree(folder.path)
                raise LearnerLost("a node with all that it had")

        return await go(run, start, lost)

    monkeypatch.setattr(recovery, "train", train)
    run = make(settings, folder, checkpoints_of(settings, folder))
    assert asyncio.run(train_through_losses(run, 0, lambda line: None)) == STEPS
    assert told(folder) == undisturbed


def test_without_a_record_of_the_start_the_win_rate_is_missing_and_that_is_said(
    settings: Any, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = die(settings, LOST)
    for marker in (tmp_path / "elsewhere").glob(f"*/{MARKER}"):  # of an older version
        content = json.loads(marker.read_text())
        del content["crc32"]
        content["files"] = {n: e["size"] for n, e in content["files"].items() if not n.startswith("run/")}
        marker.write_text(json.dumps(content))
    checkpoints = checkpoints_of(settings, folder)
    found = started_before(settings, folder, checkpoints)
    assert found is not None
    said: list[str] = []
    with recording(folder.path, "run"):
        announce(found, folder, checkpoints, said.append)
        asyncio.run(go(make(settings, folder, checkpoints), found.step))
    (line,) = said
    assert "eval_win_rate is missing from here on" in line
    assert "the drift guard takes the first values after step 6 for the start" in line
    lines = {line["step"]: line for line in told(folder)}
    assert lines[9]["eval_win_rate"] is lines[12]["eval_win_rate"] is None
    assert lines[9]["eval_reward"] == undisturbed[9]["eval_reward"]
    events = [json.loads(line)["event"] for line in (folder.path / NAME).read_text().splitlines()]
    assert events.count("start lost") == 1
    assert events.count("win rate missing") == 2
