"""The loop by itself: who is admitted when, under which version, and how a stop ends it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.loop import loop
from cluster.loop.checks import RunStopped
from cluster.loop.drift_guard import Guard
from cluster.loop.loop import Run, train
from cluster.record.nonfinite import broken_candidates
from cluster.record.run_folder import RunFolder
from learner.records import Update
from rewards.combine import Scores
from rollout.batches import batches
from rollout.records import CandidateGroup, Chunk, Noise, Prompt, SampleRequest
from rollout.settings import RolloutSettings
from selection.records import Kept, Selection


class Recorder:
    """Stands in for stages, folder and checkpoints, and writes down what the loop does."""

    def __init__(self) -> None:
        self.rollouts = self.learner = self.rewards = self
        self.missing: dict[str, str] = {}
        self.tried = 0
        self.loaded: list[int] = []
        self.committed: list[int] = []
        self.settled: list[bool] = []
        self.tracked: list[dict[str, Any]] = []
        self.admitted: list[tuple[int, int]] = []
        self.batches: list[list[int]] = []

    async def updates(self) -> int:
        return 0

    async def publish(self, version: int, *, averaged: bool = False) -> int:
        return -1 if averaged else version

    async def load(self, version: int) -> None:
        self.loaded.append(version)

    def try_again(self) -> None:
        self.tried += 1

    def alarms(self) -> dict[str, str]:
        found, self.missing = self.missing, {}
        return found

    async def commit(self, step: int, learner: Any, *, empty_batches: int) -> None:
        self.committed.append(step)

    async def settle(self, learner: Any, *, wait: bool) -> None:
        self.settled.append(wait)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()

    async def produce(group_id: int) -> int:
        await asyncio.sleep(0.001 * (group_id % 3))
        return group_id

    def admit(run: Run, step: int, *, version: int) -> list[Any]:
        groups = [2 * step, 2 * step + 1]
        made.admitted += [(group, version) for group in groups]
        return [produce(group) for group in groups]

    async def train_step(run: Run, step: int, batch: list[int], began: float) -> dict[str, Any]:
        made.batches.append(batch)
        return {"step": step + 1}

    async def evaluate(*arguments: Any) -> dict[str, float]:
        return {"eval_reward": 0.5}

    monkeypatch.setattr(loop, "admit", admit)
    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    return made


@pytest.fixture
def go(record: Recorder, configure: Any) -> Callable[..., int]:
    """Run the loop from a step; ``stop_at`` asks it to stop once that step is tracked."""

    def run_loop(start: int = 0, stop_at: int | None = None, **overrides: Any) -> int:
        stand_in: Any = record

        async def scenario() -> int:
            run: Run

            def track(metrics: dict[str, Any]) -> None:
                record.tracked.append(metrics)
                if metrics["step"] == stop_at:
                    run.stop.set()

            settings = configure(groups_per_step=2, **overrides)
            guard = Guard(settings.guard, [])
            run = Run(settings, SimpleNamespace(), (), [], stand_in, stand_in, [track], guard)  # type: ignore[arg-type]
            return await train(run, start)

        return asyncio.run(scenario())

    return run_loop


def test_lockstep_admits_a_batch_per_version_and_keeps_the_order(go: Any, record: Recorder) -> None:
    assert go(steps=3) == 3
    assert record.admitted == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert record.batches == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("staleness", [1, 2])
def test_staleness_never_exceeds_its_bound(go: Any, record: Recorder, staleness: int) -> None:
    go(steps=7, max_staleness=staleness)
    versions = dict(record.admitted)
    lags = [step - versions[group] for step, batch in enumerate(record.batches) for group in batch]
    assert max(lags) == staleness
    assert [group for batch in record.batches for group in batch] == list(range(14))


def test_evaluations_and_checkpoints_come_when_due_and_at_the_end(go: Any, record: Recorder) -> None:
    go(steps=7, eval_every=3, checkpoint_every=2)
    assert [line["step"] for line in record.tracked] == list(range(8))
    assert [line["step"] for line in record.tracked if "eval_reward" in line] == [0, 3, 6, 7]
    assert record.committed == [2, 4, 6, 7]
    assert record.settled == [False] * 6 + [True]


def test_a_resumed_loop_goes_on_where_it_stopped(go: Any, record: Recorder) -> None:
    assert go(start=4, steps=6) == 6
    assert record.loaded == [4]
    assert record.admitted == [(8, 4), (9, 4), (10, 5), (11, 5)]
    assert [line["step"] for line in record.tracked] == [5, 6]


@pytest.mark.parametrize(("stop_at", "last"), [(0, 1), (1, 1), (4, 4), (9, 9)])
def test_a_stop_ends_the_step_and_commits_a_checkpoint(
    go: Any, record: Recorder, stop_at: int, last: int
) -> None:
    assert go(steps=9, stop_at=stop_at, checkpoint_every=100, max_staleness=1) == last
    assert record.committed == [last]


def test_a_watching_reward_that_is_missing_is_an_alarm_and_pauses_nothing(go: Any, record: Recorder) -> None:
    record.missing = {"eval_style": "is missing: answered 503"}
    assert go(steps=4, eval_every=2, guard={"action": "pause"}) == 4
    assert [line.get("alarms") for line in record.tracked] == [
        {"eval_style": "is missing: answered 503"}, None, None, None, None,
    ]  # fmt: skip
    assert record.tried == 3
    record.missing = {"eval_style": "is missing: answered 503"}
    go(start=4, steps=5)
    assert record.tracked[-1]["alarms"] == {"eval_style": "is missing: answered 503"}


def test_a_crash_of_a_producer_ends_the_loop_as_itself(
    go: Any, record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash() -> None:
        raise LookupError("the pool is empty")

    monkeypatch.setattr(loop, "admit", lambda run, step, version: [crash(), crash()])
    with pytest.raises(ExceptionGroup) as caught:
        go(steps=3)
    assert caught.group_contains(LookupError, match="the pool is empty")
    assert not record.batches


class Learning:
    """Stages around one update: two kept candidates, and a learner that skips what it is told to skip.

    Its weights are ``broken`` where it is told so.
    """

    def __init__(self, in_a_row: int, broken: tuple[str, ...]) -> None:
        self.broken = broken
        self.rollouts = self.selector = self.learner = self
        self.in_a_row, self.restarts, self.samplers = in_a_row, 0, 1

    async def select(self, step: int, group_ids: list[int], scores: Any) -> Selection:
        kept = tuple(Kept(group_id=5, candidate=c, advantage=a) for c, a in ((0, -1.0), (1, 1.0)))
        return Selection(kept=kept, groups=(), metrics={"valid": 2.0})

    async def update(self, step: int, selection: Selection, groups: Any) -> Update:
        skipped = {"skipped_updates": min(self.in_a_row, 2), "skipped_in_a_row": self.in_a_row}
        metrics = {"ratio_max_deviation": 0.0, "learning_rate": 1e39, "updates": 6, **skipped}
        return Update(metrics=metrics, suspects=(1,) if self.in_a_row else (), broken=self.broken)

    async def publish(self, version: int) -> int:
        return version

    async def load(self, version: int) -> None: ...


def learn(
    configure: Any,
    folder: RunFolder,
    in_a_row: int = 0,
    finite: tuple[bool, bool] = (True, True),
    broken: tuple[str, ...] = (),
) -> dict[str, Any]:
    noises = (Noise(initial=1, path=2), Noise(initial=3, path=4))
    group = CandidateGroup(
        group_id=5, prompt=Prompt(index=0, text="a red bus"), version=1, noises=noises, images=(),
        conditioning=None, trajectories=(None, None), seconds=0.0,
    )  # fmt: skip
    stand_in: Any = Learning(in_a_row, broken)
    folder.record = lambda *arguments: None  # type: ignore[method-assign]
    settings = configure(learner={"max_skipped": 4})
    run = Run(settings, folder, (), [], stand_in, stand_in, [], Guard(settings.guard, []))
    scores: Any = None
    asked = SampleRequest(group_id=5, prompt=group.prompt, noises=noises, version=1)
    produced = loop.Produced(group, scores, {}, 0.0, 0.0, broken_candidates(asked, finite))
    return asyncio.run(loop.train_step(run, 1, [produced], 0.0))


def test_the_evidence_of_a_skipped_update_is_kept(configure: Any, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert learn(configure, folder, in_a_row=0)["skipped_updates"] == 0
    assert not folder.nonfinite.exists()
    assert learn(configure, folder, in_a_row=3)["skipped_updates"] == 2
    (line,) = folder.nonfinite.read_text().splitlines()
    assert json.loads(line) == {
        "step": 2,
        "trajectories": [
            {"group": 5, "candidate": 1, "prompt": "a red bus", "initial": 3, "path": 4, "advantage": 1.0}
        ],
    }


def test_too_many_skipped_updates_in_a_row_stop_the_run(configure: Any, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=r"4 optimizer steps in a row .*nonfinite\.jsonl"):
        learn(configure, RunFolder(tmp_path), in_a_row=4)


def test_images_that_are_not_finite_are_counted_and_kept_by_their_seeds(
    configure: Any, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    assert learn(configure, folder)["broken_images"] == 0
    assert not folder.nonfinite.exists()
    assert learn(configure, folder, finite=(True, False))["broken_images"] == 1
    (line,) = folder.nonfinite.read_text().splitlines()
    broken = {"group": 5, "candidate": 1, "prompt": "a red bus", "initial": 3, "path": 4}
    assert json.loads(line) == {"step": 2, "images": [broken]}
    folder.rewind(1)
    assert folder.nonfinite.read_text() == ""


def test_weights_that_are_no_longer_finite_stop_the_run(configure: Any, tmp_path: Path) -> None:
    told = (
        r"after 6 optimizer steps, .* rate of 1e\+39, the weights are no longer finite: a, b, c and 2 more;"
    )
    with pytest.raises(RunStopped, match=told):
        learn(configure, RunFolder(tmp_path), broken=("a", "b", "c", "d", "e"))
    assert learn(configure, RunFolder(tmp_path))["updates"] == 6


def test_a_step_without_a_finite_image_ends_the_run(configure: Any, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunStopped, match=r"none of the step's 2 images is finite.*nonfinite\.jsonl"):
        learn(configure, folder, finite=(False, False))
    assert len(json.loads(folder.nonfinite.read_text())["images"]) == 2


BROKEN = (0, 1)
"""Noises whose previews are not finite."""


class Previewing:
    """Samplers that begin a noise by its number, and rewards that score previews as they are."""

    def __init__(self) -> None:
        self.rollouts = self.rewards = self
        self.asked: list[int] = []

    def batches(self, requests: list[SampleRequest]) -> list[Any]:
        return batches(requests, RolloutSettings(batch=10))

    async def begin(self, request: SampleRequest) -> Chunk:
        self.asked.append(len(request.noises))
        numbers = tuple(noise.initial for noise in request.noises)
        finite = tuple(number not in BROKEN for number in numbers)
        return Chunk(images=numbers, finite=finite, conditioning=None, trajectories=numbers, seconds=0.5)

    async def finish(self, request: SampleRequest, begun: tuple[int, ...]) -> Chunk:
        self.asked.append(len(begun))
        assert begun == tuple(noise.initial for noise in request.noises)
        finite = (True,) * len(begun)
        return Chunk(images=begun, finite=finite, conditioning=5, trajectories=begun, seconds=0.25)

    async def score(self, prompt: Prompt, chunks: Any) -> Scores:
        numbers = [number for chunk in await asyncio.gather(*chunks) for number in chunk.images]
        values = np.array(numbers, dtype=np.float64)
        valid = (values != 31) & ~np.isin(values, BROKEN)
        return Scores(rewards={"one": values}, weights={"one": 1.0}, valid=valid, total=values, strict=None)


def test_the_candidates_whose_previews_differ_most_are_finished(configure: Any) -> None:
    selection = {"previews": 32, "candidates": 4, "keep": 2}
    settings = configure(selection=selection, rollout={"preview_steps": 3})
    stages: Any = Previewing()
    run: Any = SimpleNamespace(settings=settings, stages=stages)
    noises = tuple(Noise(initial=number, path=0) for number in range(32))
    asked = SampleRequest(group_id=5, prompt=Prompt(index=0, text="a red bus"), noises=noises, version=0)

    async def scenario() -> tuple[loop._Finishing, list[Chunk]]:
        found = await loop._screened(run, asked)
        return found, await asyncio.gather(*found.chunks)

    found, (chunk,) = asyncio.run(scenario())
    assert [noise.initial for noise in found.request.noises] == list(chunk.trajectories) == [2, 3, 29, 30]
    assert stages.asked == [10, 10, 10, 2, 4]
    assert found.spent == 2.0
    told = {"group": 5, "prompt": "a red bus", "path": 0}
    assert found.broken == [{**told, "preview": 0, "initial": 0}, {**told, "preview": 1, "initial": 1}]
