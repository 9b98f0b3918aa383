"""Runs that learned nothing: their message and exit status, also after a resume."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import train
from cluster.config.command import Status
from cluster.config.errors import RunStopped
from cluster.loop.checks import Checks
from cluster.loop.run import Step
from cluster.record.nothing_learned import first_few, nothing_learned
from cluster.record.run_folder import RunFolder
from selection.records import Selection
from tests.support.fake_stages import FakeStages
from tests.support.service_process import FLAGS, metrics_of, prepare

SCORERS = "tests.support.scorers"
SHORT = ["--steps", "2", "--eval_every", "2"]


def row(step: int, **values: float | None) -> dict[str, Any]:
    return {"step": step, "candidates": 8, "valid": 8, "zero_margin_groups": 0, "dropped_groups": 0, **values}


def test_the_reasons_are_counted_over_all_steps() -> None:
    rows = [
        {"step": 0, "eval_reward": 0.5},
        row(1, zero_margin_groups=2, tied_low=0.0, tied_high=1.0),
        row(2, zero_margin_groups=1, tied_low=0.25, tied_high=0.25, dropped_groups=1, valid=3),
        row(3, broken_images=4),
        row(4, skipped_updates=2, tied_low=None, tied_high=math.nan),
    ]  # fmt: skip
    ties, missing, broken, skipped = nothing_learned(rows, 2).split("; ", 3)
    assert ties.startswith("in 3 of 8 groups all candidates tied at a reward of 0 to 1 (raise selection.cand")
    assert missing.startswith("1 of 8 groups had fewer than two valid rewards, 27 of 32 candidates had one (")
    assert broken == "4 images were not finite (see nonfinite.jsonl)"
    assert skipped.startswith("2 updates were skipped, since their gradients were not finite (")


def test_there_may_have_been_no_step() -> None:
    assert nothing_learned([{"step": 0, "eval_reward": 0.5}], 8) == "no step was finished"


def test_many_names_are_some() -> None:
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def give_up(configure: Any, folder: RunFolder, *steps: dict[str, Any]) -> str:
    """Return the message of a run of two groups per step without any margin in these steps."""
    settings = configure(groups_per_step=2, max_empty_batches=len(steps))
    folder.create(settings)
    folder.log(row(1, zero_margin_groups=2, tied_low=9.0, tied_high=9.0))  # before an update
    run: Any = SimpleNamespace(settings=settings, empty_batches=0, stages=FakeStages(settings))

    def check(metrics: dict[str, Any]) -> None:
        run.empty_batches += 1
        selection = Selection(kept=(), groups=(), metrics=metrics)
        batch: Any = [SimpleNamespace(group=SimpleNamespace(noises=(1, 2)), broken=())]
        asyncio.run(Checks(folder).after(run, metrics["step"], Step(batch, selection, None), {}))

    for metrics in steps[:-1]:
        check(metrics)
        folder.log(metrics)
    with pytest.raises(RunStopped) as stopped:
        check(steps[-1])
    return str(stopped.value)


def test_a_run_without_margins_says_how_many_groups_tied_at_what_and_what_to_raise(
    configure: Any, tmp_path: Path
) -> None:
    steps = [row(step, zero_margin_groups=2, tied_low=0.25, tied_high=0.25) for step in (2, 3, 4)]
    assert give_up(configure, RunFolder(tmp_path / "run"), *steps) == (
        "3 steps in a row had no group with a reward margin: in 6 of 6 groups all candidates tied at a "
        "reward of 0.25 (raise selection.candidates or rollout.noise_level, take harder prompts or a reward "
        "of finer grades)"
    )


def test_a_run_without_margins_says_how_many_rewards_were_invalid(configure: Any, tmp_path: Path) -> None:
    last = row(2, valid=1, dropped_groups=2, broken_images=3)
    assert give_up(configure, RunFolder(tmp_path / "run"), last).startswith(
        "1 steps in a row had no group with a reward margin: 2 of 2 groups had fewer than two valid rewards, "
        "1 of 8 candidates had one (see log.jsonl"
    )


@pytest.fixture
def go(
    tmp_path: Path, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Run the command line in this process; return its status and output."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("COLUMNS", "500")

    def run(*arguments: str) -> tuple[int, str]:
        status = train.main(list(arguments))
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    def start(scorer: str, *flags: str) -> tuple[int, str]:
        rewards = [{"name": "odd", "scorer": f"{SCORERS}:{scorer}"}]
        inputs = prepare(tmp_path, pipeline_folder, rewards)
        return run("shapes", *FLAGS, *inputs, "--folder", str(tmp_path / "run"), *SHORT, *flags)

    start.again = lambda: run("--resume", str(tmp_path / "run"))  # type: ignore[attr-defined]
    return start


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scorer", "reason"),
    [
        ("ConstantScorer", "in 4 of 4 groups all candidates tied at a reward of 0.5 (raise "),
        ("NanScorer", "4 of 4 groups had fewer than two valid rewards, 0 of 16 candidates had one ("),
    ],
)
def test_a_reward_that_tells_nothing_is_no_success(go: Any, tmp_path: Path, scorer: str, reason: str) -> None:
    told = f"no update was applied: {reason}"
    status, output = go(scorer)
    assert status == Status.LEARNED_NOTHING == 3
    assert "2 of 2 steps" in output
    assert told in output
    assert [line["updates"] for line in metrics_of(tmp_path / "run")[1:]] == [0, 0]
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [event["reason"][:20] for event in events if event["event"] == "nothing learned"] == [reason[:20]]
    assert "Nothing was learned" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    status, output = go.again()
    assert status == 3
    assert told in output


@pytest.mark.ray
@pytest.mark.slow
def test_a_reward_that_tells_nothing_for_too_long_fails(go: Any) -> None:
    status, output = go("ConstantScorer", "--max_empty_batches", "2")
    assert status == 1
    told = "failed: 2 steps in a row had no group with a reward margin: in 4 of 4 groups all candidates tied"
    assert f"{told} at a reward of 0.5 (raise selection.candidates" in output


@pytest.mark.ray
@pytest.mark.slow
def test_what_was_learned_before_a_resume_counts(go: Any, tmp_path: Path) -> None:
    assert go("Scorer")[0] == 0
    assert metrics_of(tmp_path / "run")[-1]["updates"] == 4
    status, output = go.again()  # without a step that is left to do
    assert status == 0
    assert "no update was applied" not in output


@pytest.mark.ray
@pytest.mark.slow
def test_weights_that_are_no_longer_finite_stop_the_run(go: Any, tmp_path: Path) -> None:
    wild = ["--learner.learning_rate", "3e38", "--learner.weight_decay", "1", "--learner.betas", "[0, 0.999]"]
    status, output = go("Scorer", *wild, "--checkpoint_every", "1")
    assert status == 1
    assert "failed: after 1 optimizer steps, the last with a learning rate of 3e+38, the weights" in output
    assert "are no longer finite: " in output
    assert not list((tmp_path / "run" / "checkpoints").glob("*/COMMITTED"))
