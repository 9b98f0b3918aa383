"""Attempts at one run with one command: the first starts, the others continue or start over."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster.config.errors import UserError
from cluster.loop.resume import started_before
from cluster.record.checkpoints import Checkpoints
from cluster.record.run_folder import RunFolder
from cluster.train import main
from learner.settings import LearnerSettings
from tests.support.saving import SavingLearner


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def checkpoints(folder: RunFolder, settings: Any) -> Checkpoints:
    return Checkpoints(str(folder.checkpoints), 2, settings.model_dump(mode="json"))


def commit(folder: RunFolder, settings: Any, step: int) -> None:
    """Imitate a run that commits a checkpoint after a step and is killed after the next one."""
    learner: Any = SavingLearner()
    saved = checkpoints(folder, settings)
    asyncio.run(saved.commit(step, learner))
    asyncio.run(saved.settle(learner, wait=True))
    for done in range(step + 2):
        folder.log({"step": done})


def test_the_first_attempt_starts(folder: RunFolder, configure: Any) -> None:
    assert started_before(configure(), folder, checkpoints(folder, configure())) is None
    assert folder.config.exists()


def test_a_later_attempt_continues_from_the_newest_checkpoint(folder: RunFolder, configure: Any) -> None:
    settings = configure()
    folder.create(settings)
    commit(folder, settings, 4)
    found = started_before(settings, folder, checkpoints(folder, settings))
    assert found is not None
    assert found.step == 4
    assert [line["step"] for line in folder.history()] == [0, 1, 2, 3, 4]


def test_without_a_checkpoint_it_starts_over(folder: RunFolder, configure: Any) -> None:
    settings = configure()
    folder.create(settings)
    folder.log({"step": 0})
    folder.ledger.mkdir()
    (folder.ledger / "step-000001.parquet").touch()
    assert started_before(settings, folder, checkpoints(folder, settings)) is None
    assert folder.history() == []
    assert not list(folder.ledger.iterdir())


def test_checkpoints_elsewhere_outlive_the_folder(folder: RunFolder, configure: Any, tmp_path: Path) -> None:
    settings = configure()
    elsewhere = RunFolder(tmp_path / "elsewhere")
    commit_to = Checkpoints(str(elsewhere.checkpoints), 2, settings.model_dump(mode="json"))
    elsewhere.path.mkdir()
    commit(elsewhere, settings, 2)
    found = started_before(settings, folder, commit_to)
    assert found is not None
    assert found.step == 2
    assert folder.config.exists()


@pytest.mark.parametrize("saved", [True, False])
def test_another_run_is_refused_the_folder(folder: RunFolder, configure: Any, saved: bool) -> None:
    settings = configure()
    folder.create(settings)
    if saved:
        commit(folder, settings, 2)
    other = configure(seed=7)
    with pytest.raises(UserError, match="seed: 0 -> 7"):
        started_before(other, folder, checkpoints(folder, other))


def test_a_longer_run_may_continue(folder: RunFolder, configure: Any) -> None:
    folder.create(configure(steps=5))
    assert started_before(configure(steps=9), folder, checkpoints(folder, configure(steps=9))) is None


def test_a_folder_that_is_no_run_is_left_alone(folder: RunFolder, configure: Any) -> None:
    folder.path.mkdir()
    (folder.path / "thesis.tex").touch()
    with pytest.raises(UserError, match="already used"):
        started_before(configure(), folder, checkpoints(folder, configure()))


def test_a_kill_while_the_folder_was_made_does_not_block_it(folder: RunFolder, configure: Any) -> None:
    folder.path.mkdir()
    (folder.path / ".config.toml.17").write_text("steps =")
    assert started_before(configure(), folder, checkpoints(folder, configure())) is None


def test_attempts_need_a_folder_in_common(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shapes", "--auto-resume"]) == 2
    assert "--auto-resume needs --folder" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_has_the_objectives_keys_beside_the_learners(
    folder: RunFolder, configure: Any
) -> None:
    """Its marker and its configuration still say the same run, and a changed clip range another one."""
    settings = configure()
    older = settings.model_dump(mode="json")
    older["learner"] |= {key: older["learner"]["objective"][key] for key in LearnerSettings.moved}
    del older["learner"]["objective"]
    started_before(settings, folder, checkpoints(folder, settings))
    learner: Any = SavingLearner()
    saved = Checkpoints(str(folder.checkpoints), 2, older)
    asyncio.run(saved.commit(4, learner))
    asyncio.run(saved.settle(learner, wait=True))
    found = started_before(settings, folder, checkpoints(folder, settings))
    assert found is not None
    assert found.step == 4
    other = configure(learner={"objective": {"clip": 5e-3}})
    with pytest.raises(UserError, match=r"learner\.objective\.clip: 0\.001 -> 0\.005"):
        started_before(other, folder, checkpoints(folder, other))
