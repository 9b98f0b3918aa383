"""The loop on fake stages: admission, policy versions, and its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from cluster.config.errors import DataLost, RunStopped
from cluster.config.settings import RunSettings
from cluster.loop.loop import train
from cluster.record.events import recording
from cluster.record.names import LOG
from cluster.record.run_folder import RunFolder
from rollout.noise import candidate_noises
from rollout.prompts import prompt_at
from rollout.records import Chunk, Noise
from tests.support.fake_stages import PROMPTS, FakeStages, course

SMALL = {"groups_per_step": 2, "selection": {"candidates": 4, "keep": 2}}


@pytest.fixture
def make(configure: Any) -> Callable[..., FakeStages]:
    return lambda **overrides: FakeStages(configure(**{**SMALL, **overrides}))


def go(stages: FakeStages, start: int = 0, stop_at: int | None = None) -> int:
    """Train from a step, and stop the run after the step ``stop_at``."""
    made = course(stages.settings, stages)

    def track(metrics: dict[str, Any]) -> None:
        if metrics["step"] == stop_at:
            made.run.stop.set()

    made = course(stages.settings, stages, trackers=[track])
    return asyncio.run(train(made.run, start))


def folder_of(settings: RunSettings) -> RunFolder:
    assert settings.folder is not None
    return RunFolder(settings.folder)


def lines(stages: FakeStages) -> list[dict[str, Any]]:
    return folder_of(stages.settings).history()


def committed(stages: FakeStages) -> list[int]:
    found = folder_of(stages.settings).checkpoints.glob("step-*/COMMITTED")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def test_lockstep_admits_a_batch_per_version_and_keeps_the_order(make: Any) -> None:
    stages = make(steps=3)
    assert go(stages) == 3
    assert stages.sampled == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert stages.loaded == [0, 1, 2, 3]
    assert [line["staleness"] for line in lines(stages)[1:]] == [0, 0, 0]


@pytest.mark.parametrize("staleness", [1, 2])
def test_staleness_never_exceeds_its_bound(make: Any, staleness: int) -> None:
    stages = make(steps=7, max_staleness=staleness)
    go(stages)
    found = [line["staleness"] for line in lines(stages)[1:]]
    assert max(found) == staleness
    assert sorted(group for group, _ in stages.sampled) == list(range(14))
    assert all(group // 2 - version <= staleness for group, version in stages.sampled)


def test_evaluations_and_checkpoints_come_when_due_and_at_the_end(make: Any) -> None:
    stages = make(steps=7, eval_every=3, checkpoint_every=2, keep_checkpoints=9)
    go(stages)
    assert [line["step"] for line in lines(stages)] == list(range(8))
    assert [line["step"] for line in lines(stages) if "eval_reward" in line] == [0, 3, 6, 7]
    assert committed(stages) == [2, 4, 6, 7]


def test_a_resumed_loop_goes_on_where_it_stopped(make: Any) -> None:
    stages = make(steps=6)
    assert go(stages, start=4) == 6
    assert stages.loaded == [4, 5, 6]
    assert stages.sampled == [(8, 4), (9, 4), (10, 5), (11, 5)]
    assert [line["step"] for line in lines(stages)] == [5, 6]


@pytest.mark.parametrize(("stop_at", "last"), [(0, 1), (1, 1), (4, 4), (9, 9)])
def test_a_stop_ends_the_step_and_commits_a_checkpoint(make: Any, stop_at: int, last: int) -> None:
    stages = make(steps=9, checkpoint_every=100, max_staleness=1)
    assert go(stages, stop_at=stop_at) == last
    assert committed(stages) == [last]


def test_a_watching_reward_that_is_missing_is_an_alarm_and_pauses_nothing(make: Any) -> None:
    stages = make(steps=4, eval_every=2, guard={"action": "pause"})
    stages.missing = {"eval_style": "is missing: answered 503"}
    assert go(stages) == 4
    assert [line.get("alarms") for line in lines(stages)] == [
        {"eval_style": "is missing: answered 503"}, None, None, None, None,
    ]  # fmt: skip


def test_a_crash_of_a_producer_ends_the_loop_as_itself(make: Any) -> None:
    class Crashing(FakeStages):
        async def sample(self, batch: Any) -> list[Chunk]:
            raise LookupError("the pool is empty")

    stages = Crashing(make(steps=3).settings)
    with pytest.raises(ExceptionGroup) as caught:
        go(stages)
    assert caught.group_contains(LookupError, match="the pool is empty")
    assert stages.state == 0


def test_images_that_are_lost_before_they_are_scored_are_sampled_again(make: Any) -> None:
    class Losing(FakeStages):
        lost = False

        async def score(self, prompt: Any, chunks: Any) -> Any:
            found = await super().score(prompt, chunks)
            if not self.lost and len(self.sampled) > 2:
                self.lost = True
                raise DataLost("a node is gone")
            return found

    stages = Losing(make(steps=2).settings)
    assert go(stages) == 2
    assert stages.lost
    # The batch whole, so that the images are what they were.
    assert stages.sampled == [(0, 0), (1, 0), (2, 1), (3, 1), (2, 1), (3, 1)]


def test_the_evidence_of_a_skipped_update_is_kept(make: Any) -> None:
    stages = make(steps=1, learner={"max_skipped": 4})
    stages.update_metrics = {"skipped_updates": 2, "skipped_in_a_row": 3}
    stages.suspects = (1,)
    go(stages)
    (line,) = map(json.loads, folder_of(stages.settings).nonfinite.read_text().splitlines())
    assert line["step"] == 1
    (found,) = line["trajectories"]
    rows = {(row["group"], row["candidate"]): row for row in ledger(stages)}
    row = rows[found["group"], found["candidate"]]
    assert (found["initial"], found["path"]) == (row["noise_seed"], row["path_seed"])
    assert found["advantage"] == pytest.approx(row["advantage"])


def ledger(stages: FakeStages) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(folder_of(stages.settings).ledger).to_pylist()
    return rows


def stopped(stages: FakeStages) -> str:
    with pytest.raises(ExceptionGroup) as caught:
        go(stages)
    known, rest = caught.value.split(RunStopped)
    assert known is not None
    assert rest is None
    return str(known.exceptions[0])


def test_too_many_skipped_updates_in_a_row_stop_the_run(make: Any) -> None:
    stages = make(steps=2, learner={"max_skipped": 4})
    stages.update_metrics = {"skipped_updates": 2, "skipped_in_a_row": 4}
    assert "nonfinite.jsonl" in stopped(stages)
    assert folder_of(stages.settings).nonfinite.exists()
    assert len(lines(stages)) == 1  # the evaluation before the first step


def test_ratios_that_are_not_one_on_policy_stop_the_run(make: Any) -> None:
    stages = make(steps=2)
    stages.update_metrics = {"ratio_max_deviation": 0.5}
    assert "on-policy ratios are off by 0.5" in stopped(stages)


def test_ratios_that_come_close_to_the_clip_range_are_an_event(make: Any) -> None:
    stages = make(steps=2)
    stages.update_metrics = {"log_ratio.t3": -8e-4, "log_ratio_rms.t3": 9e-4}
    folder = folder_of(stages.settings)
    with recording(folder.path.parent, "run"):
        go(stages)
    events = [json.loads(line) for line in (folder.path.parent / LOG).read_text().splitlines()]
    found = [event for event in events if event["event"] == "objective in doubt"]
    assert [event["step"] for event in found] == [1, 2]
    assert "at denoising step 3" in found[0]["story"]


def test_images_that_are_not_finite_are_counted_and_kept_by_their_seeds(make: Any) -> None:
    stages = make(steps=1)
    stages.finite = lambda noise: noise.path % 2 == 0
    go(stages)
    folder = folder_of(stages.settings)
    count = sum(not row["valid"] for row in ledger(stages))
    assert lines(stages)[1]["broken_images"] == count > 0
    (line,) = map(json.loads, folder.nonfinite.read_text().splitlines())
    assert (line["step"], len(line["images"])) == (1, count)
    assert all(image["path"] % 2 for image in line["images"])
    folder.rewind(0)
    assert folder.nonfinite.read_text() == ""


def test_weights_that_are_no_longer_finite_stop_the_run(make: Any) -> None:
    stages = make(steps=2)
    stages.broken = ("a", "b", "c", "d", "e")
    stages.update_metrics = {"learning_rate": 1e39}
    said = stopped(stages)
    assert "rate of 1e+39" in said
    assert "a, b, c and 2 more" in said


def test_a_step_without_a_finite_image_ends_the_run(make: Any) -> None:
    stages = make(steps=2)
    stages.finite = lambda noise: False
    assert "none of the step's 8 images is finite" in stopped(stages)
    line, *_ = folder_of(stages.settings).nonfinite.read_text().splitlines()
    assert len(json.loads(line)["images"]) == 8


def test_steps_without_a_margin_end_the_run(make: Any) -> None:
    stages = make(steps=9, max_empty_batches=3)
    stages.value = lambda noise: 0.5
    assert "3 steps in a row" in stopped(stages)
    assert stages.state == 0
    assert len(lines(stages)) == 3  # the start and two empty steps
    assert lines(stages)[1]["loss"] is None


def test_the_candidates_whose_drafts_differ_most_are_finished(make: Any) -> None:
    selection = {"drafts": 32, "candidates": 4, "keep": 2}
    stages = make(steps=1, groups_per_step=1, selection=selection, rollout={"draft_steps": 1, "batch": 10})
    seeds: list[int] = []

    def rank(noise: Noise) -> float:
        if noise.path not in seeds:
            seeds.append(noise.path)
        return float(seeds.index(noise.path))

    stages.value = rank
    stages.finite = lambda noise: rank(noise) not in (0, 31)  # the first and the last draft
    go(stages)
    assert sorted(seeds.index(row["path_seed"]) for row in ledger(stages)) == [1, 2, 29, 30]
    assert len(seeds) == 32
    (line,) = map(json.loads, folder_of(stages.settings).nonfinite.read_text().splitlines())
    assert [image["draft"] for image in line["images"]] == [0, 31]


def test_prompts_with_narrow_margins_draw_more_within_the_steps_budget(make: Any) -> None:
    """Of the first three candidates of each group, those of groups 0 and 3 differ least."""
    selection = {"adaptive": 3, "candidates": 6, "keep": 2}
    stages = make(steps=1, groups_per_step=4, selection=selection, rollout={"batch": 5})
    spread = {0: 0.1, 1: 0.9, 2: 0.8, 3: 0.2}
    known = {
        noise: (group, place)
        for group in spread
        for place, noise in enumerate(candidate_noises(0, prompt_of(stages, group), group, 12))
    }

    def value(noise: Noise) -> float:
        group, place = known[noise]
        return spread[group] * place

    stages.value = value
    go(stages)
    rows = ledger(stages)
    drawn = {group: [row["candidate"] for row in rows if row["group"] == group] for group in spread}
    assert {group: len(places) for group, places in drawn.items()} == {0: 9, 1: 3, 2: 3, 3: 9}
    assert all(places == list(range(len(places))) for places in drawn.values())
    assert {row["path_seed"] for row in rows} <= {noise.path for noise in known}
    best = {group: max(row["reward"] for row in rows if row["group"] == group) for group in spread}
    assert best == pytest.approx({0: 0.8, 1: 1.8, 2: 1.6, 3: 1.6})


def prompt_of(stages: FakeStages, group: int) -> int:
    return prompt_at(PROMPTS, stages.settings.seed, group).index
