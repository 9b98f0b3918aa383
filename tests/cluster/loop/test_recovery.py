"""Recovery from the last checkpoint: its step, its limit, and its failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config.errors import DataLost, GaveUp, LearnerError, LearnerLost, UserError
from cluster.config.settings import RunSettings
from cluster.loop import recovery
from cluster.loop.recovery import ATTEMPTS, train_through_losses
from tests.support.fake_stages import FakeStages, course

STEPS, EVERY = 10, 4


class Failing(FakeStages):
    """Stages that fail before some updates, and record the states from which training continued."""

    def __init__(self, settings: RunSettings, failures: list[tuple[int, Exception]]) -> None:
        super().__init__(settings)
        self.planned, self.starts = failures, []
        self.lines: list[str] = []

    async def updates(self) -> int:
        self.starts.append(self.state)
        return self.state

    async def update(self, step: int, selection: Any, groups: Any) -> Any:
        assert self.state == step
        if self.planned and self.planned[0][0] == step:
            raise self.planned.pop(0)[1]
        return await super().update(step, selection, groups)


Go = Callable[..., Failing]


@pytest.fixture
def go(configure: Any, monkeypatch: pytest.MonkeyPatch) -> Go:
    """Train with failures, each before a step, and return the stages."""
    monkeypatch.setattr(recovery, "PAUSE", 0.0)
    settings = configure(
        steps=STEPS, checkpoint_every=EVERY, groups_per_step=2, selection={"candidates": 4, "keep": 2}
    )
    stages = Failing(settings, [])

    def run_through(*failures: tuple[int, Exception]) -> Failing:
        stages.planned = list(failures)
        made = course(settings, stages)
        assert asyncio.run(train_through_losses(made, 0, stages.lines.append)) == STEPS
        assert [line["step"] for line in made.folder.history()] == list(range(STEPS + 1))
        assert stages.state == STEPS
        return stages

    run_through.lines = stages.lines  # type: ignore[attr-defined]
    return run_through


def lost(story: str = "learner update: ActorDiedError: rank 1") -> Exception:
    return LearnerLost(story)


def test_a_loss_takes_the_run_back_to_its_last_checkpoint(go: Any) -> None:
    stages = go((6, lost()), (9, lost()))
    assert stages.starts == [0, 4, 8]
    assert stages.restarted == 2
    assert go.lines[0] == "learner update: ActorDiedError: rank 1: all ranks restart from step 4"


def test_a_damaged_checkpoint_is_passed_over(go: Any, tmp_path: Path) -> None:
    class Damaging(LearnerLost):
        """Ranks that die with a bit of what they saved last."""

        def __str__(self) -> str:
            (tmp_path / "run/checkpoints/step-8/state").write_text("9")
            return "rank 1 is dead"

    stages = go((9, Damaging()))
    assert stages.starts == [0, 4]
    assert stages.restarted == 1
    assert go.lines[0].startswith("damaged, so an older checkpoint is used: ")
    assert "step-8/state has the CRC-32" in go.lines[0]
    assert go.lines[1] == "rank 1 is dead: all ranks restart from step 4"


def test_without_a_whole_checkpoint_the_run_ends(go: Any, tmp_path: Path) -> None:
    class Damaging(LearnerLost):
        def __str__(self) -> str:
            for state in (tmp_path / "run/checkpoints").glob("*/state"):
                state.unlink()
            return "rank 1 is dead"

    with pytest.raises(UserError, match=r"every checkpoint is damaged: .*step-8.*step-4"):
        go((9, Damaging()))


def test_without_a_checkpoint_the_run_starts_over(go: Any) -> None:
    assert go((2, lost())).starts == [0, 0]


def test_data_on_a_node_that_is_gone_are_a_loss(go: Any) -> None:
    assert go((5, DataLost("ObjectLostError: it was there"))).starts == [0, 4]
    assert "ObjectLostError" in go.lines[0]


def test_a_loss_while_going_back_is_one_more(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    restart, failures = FakeStages.restart, [LearnerLost("learner join: ActorDiedError: rank 0")]

    async def fails_once(self: FakeStages) -> None:
        await restart(self)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(Failing, "restart", fails_once)
    assert go((5, lost())).starts == [0, 4]
    assert len(go.lines) == 2


def test_going_back_has_an_end(go: Any) -> None:
    with pytest.raises(GaveUp, match=f"rank 1; this is loss number {ATTEMPTS + 1} after step 4"):
        go(*[(6, lost())] * (ATTEMPTS + 1))
    assert len(go.lines) == ATTEMPTS


def test_a_new_checkpoint_makes_good(go: Any) -> None:
    assert go(*[(2, lost())] * ATTEMPTS, *[(6, lost())] * ATTEMPTS).starts == [0] * 4 + [4] * 3


@pytest.mark.parametrize("error", [
    LearnerError("learner update: MemoryError: too little"),
    ExceptionGroup("", [LearnerLost("rank 1"), LookupError("something else, too")]),
])  # fmt: skip
def test_what_would_happen_again_ends_the_run(go: Any, error: Exception) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        go((6, error))
    assert caught.group_contains(type(error) if isinstance(error, LearnerError) else LookupError)
    assert not go.lines
