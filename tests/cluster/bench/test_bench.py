"""The benchmarks of one process: their output, and that they need neither Ray nor DeepSpeed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from cluster.bench.__main__ import BENCHMARKS, main
from cluster.bench.table import BenchmarkReport, Measurement
from cluster.bench.timing import in_turns
from tests.support.paths import ROOT

ALONE = """
import sys
for name in ("ray", "deepspeed", "pydantic_settings"):
    sys.modules[name] = None  # importing it fails
import cluster.bench.step
from cluster.bench.__main__ import main
for arguments in {calls}:
    status = main(arguments)
    if status:
        sys.exit(status)
"""
SMALL = ["--random", "tiny", "--repeats", "2", "--steps", "3", "--batch", "4"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of each benchmark, two of them run by a process that cannot import Ray."""
    folder = tmp_path_factory.mktemp("bench")
    names = ("sampler", "learner", "step")
    *calls, here = [[name, *SMALL, "--json", str(folder / name)] for name in names]
    here[2] = "tiny-sd35"
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(calls=calls)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(here) == 0
    return {name: json.loads((folder / name).read_text()) for name in names}


def test_a_report_says_what_ran_where(found: dict[str, Any]) -> None:
    for name, report in found.items():
        assert report["command"][:4] == ["python", "-m", "cluster.bench", name]
        assert report["machine"]["cores"] >= 1
        assert report["rows"]


def test_the_sampler_counts_the_transformers_work(found: dict[str, Any]) -> None:
    rows = found["sampler"]["rows"]
    assert len(rows["ours, with log-probs (s)"]) == len(rows["diffusers pipeline (s)"]) == 2
    # 3 steps of 2 branches, of a model with 0.65 M parameters and 30 tokens, some of which not all layers see
    (gflops,) = rows["transformer GFLOPs per image"]
    assert 0.3 < gflops * 1e9 / (3 * 2 * 2 * 0.65e6 * 30) < 1.2
    assert all(0 < share < 100 for share in rows["share of the peak, ours (%)"])


def test_the_learner_runs_all_pairs(found: dict[str, Any]) -> None:
    report = found["learner"]
    assert "8 trajectories, 16 pairs in forwards of 512" in report["title"]
    assert all(value > 0 for values in report["rows"].values() for value in values)


def test_both_steps_have_the_same_loss(found: dict[str, Any]) -> None:
    rows = found["step"]["rows"]
    assert rows["losses differ by, at most"][0] <= 1e-5
    assert len(rows["plain loop / ours"]) == len(rows["ours, processor (s)"]) == 2


def test_rows_of_both_steps_are_counted(found: dict[str, Any]) -> None:
    """With guidance and KL: Flow-GRPO's script has 4 passes and two backward passes per trained pair."""
    steps, trained, rows = 3, 2, found["step"]["rows"]
    assert rows["rows per image without gradients, plain loop"] == [2 * steps + 2 * trained]
    assert rows["rows per image with gradients, plain loop"] == [2 * trained]
    assert rows["rows per image without gradients, ours"] == [2 * steps + 3 * trained]
    assert rows["rows per image with gradients, ours"] == [trained]


def test_works_take_turns() -> None:
    order: list[str] = []
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    times = in_turns(works, "cpu", repeats=2, warmup=1)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_a_table_shows_median_and_spread(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    rows = [Measurement("many", [3.0, 1.0, 2.5], 1), Measurement("one", [7.0], 0)]
    Console().print(BenchmarkReport("title", rows).table())
    shown = capsys.readouterr().out
    assert all(cell in shown for cell in ("2.5", "1.0", "3.0", "7", "title"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sampler", "--random", "sd9"],
            "--random: got 'sd9', expected one of tiny, tiny-sd35, sd3-medium, sd35-medium",
        ),
        (["sampler", "--model", "nowhere/at-all"], "model.path: nowhere/at-all is neither a folder"),
        (["learner", "--micro-bach", "3"], "--micro-bach: no such option"),
        (["step", "--lora-rank", "0"], "--lora-rank: got 0, expected an adapter"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # who has no network waits for it
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_benchmark_is_answered_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed"]) == 2
    listed = capsys.readouterr().err
    assert all(name in listed for name in BENCHMARKS)
