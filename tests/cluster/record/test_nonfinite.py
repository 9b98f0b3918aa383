"""Images that are not finite, through the whole service: missing, counted, named, and never shown."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from cluster import train
from cluster.actors import samplers
from tests.support.poisoned import is_poisoned
from tests.support.service_process import FLAGS, STEPS, ledger_of, metrics_of, prepare

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MORE = ["--eval_samples", "4", "--checkpoint_every", "8", "--groups_per_step", "4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Path:
    """The folder of a run in which one image in four is not finite."""
    home = tmp_path_factory.mktemp("broken")
    folder = home / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(samplers, "SAMPLER", "tests.support.poisoned:PoisonedSampler")
        status = train.main(
            ["shapes", *FLAGS, *prepare(home, pipeline_folder), *MORE, "--folder", str(folder)]
        )
    assert status == 0
    return folder


def test_candidates_that_are_not_finite_have_no_reward_and_are_not_trained(finished: Path) -> None:
    rows = ledger_of(finished).to_pylist()
    broken = [row for row in rows if is_poisoned(row["noise_seed"])]
    assert 0 < len(broken) < len(rows) / 2
    for row in rows:
        poisoned = is_poisoned(row["noise_seed"])
        missing = [row[name] is None for name in ("reward", "reward_jpeg", "reward_shapes")]
        assert missing == [poisoned] * 3
        assert row["valid"] is not poisoned
        assert not (poisoned and row["selected"])
    assert sum(line["broken_images"] for line in metrics_of(finished)[1:]) == len(broken)


def test_every_one_is_named_by_its_seeds(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "nonfinite.jsonl").read_text().splitlines()]
    found = {
        (line["step"], one["group"], one["candidate"], one["initial"], one["path"], one["prompt"])
        for line in lines
        for one in line.get("images", [])
    }
    assert found == {
        (r["step"], r["group"], r["candidate"], r["noise_seed"], r["path_seed"], r["prompt"])
        for r in ledger_of(finished).to_pylist()
        if is_poisoned(r["noise_seed"])
    }
    held_out = pq.read_table(finished / "eval" / "step-000000.parquet").to_pylist()
    listed = {one["initial"] for line in lines if line["step"] == 0 for one in line["eval_images"]}
    assert listed == {row["noise_seed"] for row in held_out if is_poisoned(row["noise_seed"])} != set()


def test_evaluations_leave_them_out(finished: Path) -> None:
    for line in metrics_of(finished):
        if "eval_reward" not in line:
            continue
        rows = pq.read_table(finished / "eval" / f"step-{line['step']:06d}.parquet").to_pylist()
        good = [row["reward"] for row in rows if not is_poisoned(row["noise_seed"])]
        assert [row["reward"] is None for row in rows] == [is_poisoned(row["noise_seed"]) for row in rows]
        assert line["eval_broken_images"] == len(rows) - len(good) > 0
        assert line["eval_reward"] == pytest.approx(sum(good) / len(good))
        shown = {path.name for path in (finished / "images" / f"eval-{line['step']:06d}").iterdir()}
        assert shown == {
            f"p{row['prompt_index']:03d}-s{row['sample']}.png"
            for row in rows
            if not is_poisoned(row["noise_seed"])
        }


def test_the_log_and_the_report_say_so(finished: Path) -> None:
    events = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    counted = [event["count"] for event in events if event["event"] == "images not finite"]
    steps = metrics_of(finished)[1:]
    assert counted == [line["broken_images"] for line in steps if line["broken_images"]]
    assert [event for event in events if event["event"] == "held-out images not finite"]
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert f"{sum(counted)} images of training were not finite" in page
    assert len(steps) == STEPS


def test_a_decoder_that_makes_nothing_finite_ends_the_run(
    tmp_path: Path, pipeline_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tmp_path / "model", tmp_path / "run"
    shutil.copytree(pipeline_folder, model)
    (weights,) = (model / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"][:] = math.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert train.main(["shapes", *FLAGS, *prepare(tmp_path, model), "--folder", str(folder)]) == 1
    assert "failed: none of the step's 8 images is finite" in capsys.readouterr().err
    (start,) = metrics_of(folder)
    assert start["eval_reward"] is None
    assert start["eval_broken_images"] == 3
    lines = [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["step"], len(line.get("images", []))) for line in lines] == [(0, 0), (1, 8)]
