"""Run folders that are lost while the checkpoints are elsewhere: the run continues unchanged."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config.errors import LearnerLost
from cluster.loop.loop import train
from cluster.loop.recovery import train_through_losses
from cluster.loop.resume import report_losses, started_before
from cluster.record.checkpoints import Checkpoints, checkpoints_of
from cluster.record.events import recording
from cluster.record.marker import Commit
from cluster.record.names import LOG, MARKER
from cluster.record.run_folder import RunFolder
from tests.support.fake_stages import FakeStages, course

STEPS, EVERY, LOST = 12, 3, 8


@pytest.fixture
def settings(configure: Any, tmp_path: Path) -> Any:
    return configure(
        steps=STEPS, eval_every=EVERY, checkpoint_every=EVERY, eval_samples=1, groups_per_step=2,
        selection={"candidates": 4, "keep": 2},
        checkpoints=(tmp_path / "elsewhere").as_uri(),
        eval_rewards=[{"name": "shapes"}, {"name": "jpeg", "weight": 0}],
        guard={"steps": 2, "change": 0.2, "sigmas": 1},
    )  # fmt: skip


def stages_of(settings: Any, before: Callable[[int], None] = lambda step: None) -> FakeStages:
    """Stages whose images lose their edges late in the run; ``before`` may break off before an update."""
    stages = FakeStages(settings)
    stages.measured = lambda group: 1.0 if (step := group // 2 + 1) < 7 else 0.1 * step
    stages.before_update = lambda step: before(step + 1)
    return stages


def go(
    settings: Any,
    folder: RunFolder,
    checkpoints: Checkpoints,
    commit: Commit | None = None,
    before: Callable[[int], None] = lambda step: None,
) -> None:
    made = course(settings, stages_of(settings, before), folder, checkpoints)

    async def scenario() -> None:
        assert await train(made.run, await made.go_to(commit)) == STEPS

    asyncio.run(scenario())


def told(folder: RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in folder.history()]


@pytest.fixture
def undisturbed(settings: Any, tmp_path: Path) -> list[dict[str, Any]]:
    folder = RunFolder(tmp_path / "undisturbed")
    folder.create(settings)
    checkpoints = Checkpoints(str(tmp_path / "undisturbed/checkpoints"), 2)
    go(settings, folder, checkpoints)
    lines = told(folder)
    alarms = {line["step"]: line["alarms"] for line in lines if "alarms" in line}
    assert alarms == {
        6: {"eval_jpeg": "fell from 1 to 0.78"},
        8: {"image_edges": "fell from 1 to 0.75"},
    }
    assert [line["eval_win_rate"] for line in lines if "eval_win_rate" in line] == [0.0, 0.6, 0.6, 0.6, 0.6]
    return lines


class Killed(Exception):
    """The driver was killed."""


def kill_at(step: int) -> Callable[[int], None]:
    def lost(now: int) -> None:
        if now == step:
            raise Killed

    return lost


def die(settings: Any, at: int) -> RunFolder:
    """Run until a kill before a step, and remove the folder."""
    folder = RunFolder(settings.folder)
    folder.create(settings)
    with pytest.raises(ExceptionGroup) as caught:
        go(settings, folder, checkpoints_of(settings, folder), before=kill_at(at))
    assert caught.group_contains(Killed)
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
    report_losses(found, folder, checkpoints, said.append)
    assert said == []
    go(settings, folder, checkpoints, found)
    assert told(folder) == undisturbed


def test_a_loss_of_ranks_and_folder_within_the_run(settings: Any, undisturbed: list[dict[str, Any]]) -> None:
    folder = RunFolder(settings.folder)
    folder.create(settings)
    pending = [LOST]

    def lost(step: int) -> None:
        if pending == [step]:
            pending.clear()
            shutil.rmtree(folder.path)
            raise LearnerLost("a node with all that it had")

    made = course(settings, stages_of(settings, lost), folder, checkpoints_of(settings, folder))
    assert asyncio.run(train_through_losses(made, 0, lambda line: None)) == STEPS
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
        report_losses(found, folder, checkpoints, said.append)
        go(settings, folder, checkpoints, found)
    (line,) = said
    assert "eval_win_rate is missing from here on" in line
    assert "the drift guard compares with the first values after step 6" in line
    lines = {line["step"]: line for line in told(folder)}
    assert lines[9]["eval_win_rate"] is lines[12]["eval_win_rate"] is None
    assert lines[9]["eval_reward"] == undisturbed[9]["eval_reward"]
    events = [json.loads(line)["event"] for line in (folder.path / LOG).read_text().splitlines()]
    assert events.count("start lost") == 1
    assert events.count("win rate missing") == 2
