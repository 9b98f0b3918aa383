"""Going back to the last checkpoint: from where, how often, and for which failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

from cluster.actors.learner import LearnerError, LearnerLost
from cluster.config.errors import UserError
from cluster.loop import recovery
from cluster.loop.drift_guard import Guard
from cluster.loop.loop import Run
from cluster.loop.recovery import ATTEMPTS, GaveUp, train_through_losses
from cluster.record.checkpoints import Checkpoints
from cluster.record.run_folder import RunFolder
from learner.records import Written
from tests.support.saving import written_at

STEPS, EVERY = 10, 4


class StandIn:
    """Learner and samplers; the learner's state is how many steps it has done."""

    def __init__(self) -> None:
        self.rollouts = self.learner = self
        self.state = 0
        self.starts: list[int] = []
        self.forgotten = 0

    async def save(self, url: str) -> None:
        self.url = url
        (Path(url.removeprefix("file://")) / "state").write_text(str(self.state))

    async def saved(self, *, wait: bool) -> list[Written]:
        return written_at(self.url)

    async def restart(self) -> None:
        self.state = 0

    async def restore(self, url: str) -> None:
        self.state = int((Path(url.removeprefix("file://")) / "state").read_text())

    def forget(self) -> None:
        self.forgotten += 1


Go = Callable[..., StandIn]


@pytest.fixture
def go(configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """Train with failures, each before a step, in their order; returns what the learner went through."""

    def run_through(*failures: tuple[int, Exception]) -> StandIn:
        stand_in, pending = StandIn(), list(failures)
        settings, folder = configure(steps=STEPS), RunFolder(tmp_path / "run")
        folder.create(settings)

        async def train(run: Run, start: int) -> int:
            stand_in.starts.append(start)
            assert stand_in.state == start
            for step in range(start, STEPS):
                if pending and pending[0][0] == step:
                    raise pending.pop(0)[1]
                stand_in.state += 1
                run.folder.log({"step": step + 1})
                if (step + 1) % EVERY == 0:
                    await run.checkpoints.commit(step + 1, run.stages.learner)
                    await run.checkpoints.settle(run.stages.learner, wait=True)
            return STEPS

        monkeypatch.setattr(recovery, "train", train)
        monkeypatch.setattr(recovery, "PAUSE", 0.0)
        stages: Any = stand_in
        checkpoints = Checkpoints(str(folder.checkpoints), 2)
        run = Run(settings, folder, (), [], stages, checkpoints, [], Guard(settings.guard, []))
        assert asyncio.run(train_through_losses(run, 0, stories.append)) == STEPS
        assert [line["step"] for line in folder.history()] == list(range(1, STEPS + 1))
        assert stand_in.state == STEPS
        return stand_in

    stories: list[str] = []
    run_through.stories = stories  # type: ignore[attr-defined]
    return run_through


def lost(story: str = "learner update: ActorDiedError: rank 1") -> Exception:
    return ExceptionGroup("unhandled errors in a TaskGroup", [LearnerLost(story)])


def test_a_loss_takes_the_run_back_to_its_last_checkpoint(go: Any) -> None:
    stand_in = go((6, lost()), (9, lost()))
    assert stand_in.starts == [0, 4, 8]
    assert stand_in.forgotten == 2
    assert go.stories[0] == "learner update: ActorDiedError: rank 1: all ranks start anew, from step 4"


def test_a_damaged_checkpoint_is_passed_over(go: Any, tmp_path: Path) -> None:
    class Damaging(LearnerLost):
        """Ranks that die with a bit of what they saved last."""

        def __str__(self) -> str:
            (tmp_path / "run/checkpoints/step-8/state").write_text("9")
            return "rank 1 is dead"

    stand_in = go((9, Damaging()))
    assert stand_in.starts == [0, 4]
    assert stand_in.forgotten == 1
    assert go.stories[0].startswith("damaged, so an older checkpoint is taken: ")
    assert "step-8/state has the CRC-32" in go.stories[0]
    assert go.stories[1] == "rank 1 is dead: all ranks start anew, from step 4"


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
    gone = ObjectLostError("ab" * 28, None, "")
    assert go((5, ExceptionGroup("", [gone]))).starts == [0, 4]
    assert "ObjectLostError" in go.stories[0]


def test_a_loss_while_going_back_is_one_more(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    restart, failures = StandIn.restart, [LearnerLost("learner join: ActorDiedError: rank 0")]

    async def fails_once(self: StandIn) -> None:
        await restart(self)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(StandIn, "restart", fails_once)
    assert go((5, lost())).starts == [0, 4]
    assert len(go.stories) == 2


def test_going_back_has_an_end(go: Any) -> None:
    with pytest.raises(GaveUp, match=f"rank 1; it is the loss number {ATTEMPTS + 1} after step 4"):
        go(*[(6, lost())] * (ATTEMPTS + 1))
    assert len(go.stories) == ATTEMPTS


def test_a_new_checkpoint_makes_good(go: Any) -> None:
    assert go(*[(2, lost())] * ATTEMPTS, *[(6, lost())] * ATTEMPTS).starts == [0] * 4 + [4] * 3


@pytest.mark.parametrize("error", [
    LearnerError("learner update: MemoryError: too little"),
    ExceptionGroup("", [LearnerError("learner update: MemoryError: too little")]),
    ExceptionGroup("", [LearnerLost("rank 1"), LookupError("something else, too")]),
])  # fmt: skip
def test_what_would_happen_again_ends_the_run(go: Any, error: Exception) -> None:
    with pytest.raises(type(error)):
        go((6, error))
    assert not go.stories
