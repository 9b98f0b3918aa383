"""Learner ranks: failures that count as a loss, and the restart of all ranks."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.actors import learner as learners
from cluster.actors.learner import Learner, learner_spec
from cluster.config.errors import LearnerError, LearnerLost

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("node")]


@pytest.fixture
def make(configure: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Learner]:
    """Two ranks that start at once, instead of DeepSpeed's."""

    monkeypatch.setattr(learners, "NOTICED", 3.0)

    def begin(**cluster: Any) -> Learner:
        settings = configure(learner={"ranks": 2, "threads": 1}, cluster=cluster)
        spec = learner_spec(settings)
        arguments = {**spec.arguments, "marker": str(tmp_path / "built")}
        return Learner(settings, replace(spec, target="tests.support.workers:FakeRank", arguments=arguments))

    return begin


async def pids(learner: Learner) -> list[int]:
    return [await actor.pid.remote() for actor in learner.actors]


async def hurt(learner: Learner, number: signal.Signals) -> None:
    """Call all ranks, and send the second one a signal meanwhile."""
    await learner.join()
    second = (await pids(learner))[1]
    under_way = asyncio.ensure_future(learner.restore("sleep"))
    await asyncio.sleep(0.5)
    os.kill(second, number)
    await under_way


def test_a_rank_that_dies_is_a_loss_at_once(make: Any) -> None:
    with pytest.raises(LearnerLost, match=r"^learner restore: ActorDiedError"):
        asyncio.run(asyncio.wait_for(hurt(make(), signal.SIGKILL), 30))


def test_a_rank_that_hangs_is_a_loss_after_the_deadline(make: Any) -> None:
    with pytest.raises(LearnerLost, match=r"^learner restore: no answer in 3 s$"):
        asyncio.run(asyncio.wait_for(hurt(make(learner_deadline=3), signal.SIGSTOP), 30))


def test_an_error_of_a_rank_is_its_own_though_the_others_wait_for_it(make: Any) -> None:
    async def scenario() -> None:
        learner = make()
        await learner.join()
        await learner.restore("1")

    with pytest.raises(LearnerError, match=r"^learner restore: MemoryError: 8 GB are not enough$"):
        asyncio.run(asyncio.wait_for(scenario(), 30))


def test_where_a_rank_has_died_the_complaint_of_another_one_is_no_error_of_its_own(make: Any) -> None:
    async def scenario() -> None:
        learner = make()
        await learner.join()
        second = (await pids(learner))[1]
        os.kill(second, signal.SIGSTOP)  # so that the first one complains before the second one dies
        under_way = asyncio.ensure_future(learner.restore("0"))
        await asyncio.sleep(1)
        os.kill(second, signal.SIGKILL)
        await under_way

    with pytest.raises(LearnerLost, match=r"^learner restore: ActorDiedError"):
        asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_rank_that_dies_while_it_starts_is_a_loss_and_one_that_cannot_be_built_is_not(
    make: Any, tmp_path: Path
) -> None:
    async def scenario() -> None:
        learner = make()
        for pid in await pids(learner):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(LearnerLost, match=r"^learner could not start"):
            await learner.join()
        (tmp_path / "built").touch()
        with pytest.raises(LearnerError, match=r"^learner could not start: OSError: no weights here$"):
            await learner.restart()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_all_ranks_start_anew(make: Any) -> None:
    async def scenario() -> None:
        learner = make()
        await learner.join()
        before = await pids(learner)
        os.kill(before[0], signal.SIGKILL)
        with pytest.raises(LearnerLost):
            await learner.save("")
        await learner.restart()
        assert not set(before) & set(await pids(learner))
        await learner.save("")
        assert learner.restarts == 2

    asyncio.run(asyncio.wait_for(scenario(), 60))
