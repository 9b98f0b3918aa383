"""The report of a run folder of real Parquet, PNG and JSON files, complete and incomplete."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cluster.record.run_data import NotARunError, load_run
from cluster.report.__main__ import main
from cluster.report.charts import DARK, LIGHT, moving_average
from cluster.report.drift import guard_chart
from cluster.report.held_out import direction, evenly, held_out_section
from cluster.report.numbers import MISSING, change, duration, show
from cluster.report.pairs import noise_section, spread, within_share
from cluster.report.report import write_report
from cluster.report.summary import changes, stage_costs
from cluster.report.summary_table import summary_table
from cluster.report.thumbnails import THUMBNAIL, THUMBNAIL_BYTES, picture
from tests.support.report_run import CANDIDATES, GROUPS, KEEP, PICTURED, make_run, save, table


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def body_of(folder: Path) -> str:
    """Return the page without Plotly and images."""
    page = re.sub(r"<script>.*?</script>", "", page_of(folder), flags=re.DOTALL)
    return re.sub(r"data:image/[a-z]+;base64,[^\"]+", "IMAGE", page)


def test_page_is_one_file_that_loads_nothing(run: Path) -> None:
    body = body_of(run)
    assert not re.search(r"""(?:src|href)=["'](?!IMAGE|data:|\#)""", body)
    assert "url(" not in body
    assert "@import" not in body
    assert (run / "report.html").stat().st_size < 9 * 2**20
    assert not list(run.glob(".*"))


def test_the_guard_shows_its_lines_and_alarms(run: Path) -> None:
    assert 'id="plot-guard"' in body_of(run)
    assert (
        "It raised 1 alarm: <strong>image_color_entropy</strong> fell from 1.3 to 0.6 at step 17."
        in body_of(run)
    )
    chart = guard_chart(load_run(run))
    assert chart is not None
    lines = {line.get("name"): line for line in json.loads(chart.figure)["data"]}
    entropy, cross = lines["color entropy"], lines[None]
    assert entropy["y"][4] == pytest.approx(1.0)
    assert entropy["y"][-1] < 0.5
    assert (cross["x"], cross["y"]) == ([17], [entropy["y"][16]])


def test_a_run_without_a_guard_has_no_panel(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith(("image_", "alarms"))} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert "The drift guard" not in body_of(run)


def test_page_says_what_the_run_is(run: Path) -> None:
    body = body_of(run)
    for text in (
        "shapes", "tiny-shapes", "noise margin", "24 → 8 kept", "Held-out reward", "1 in 3 sampled",
        "100% of at most",
    ):  # fmt: skip
        assert text in body
    assert "Missing data" not in body


def test_pairs_are_the_widest_of_first_middle_and_last_step(run: Path) -> None:
    moments, notes = noise_section(load_run(run))
    assert [moment.step for moment in moments] == [1, 20, 40]
    assert notes == []
    for moment in moments:
        margins = [pair.margin for pair in moment.pairs]
        assert margins == sorted(margins, reverse=True)
        assert moment.pictured == PICTURED
        for pair in moment.pairs:
            assert pair.low.row["prompt"] == pair.high.row["prompt"]
            assert len(pair.dots) == CANDIDATES
            assert sum(dot.role == "low" for dot in pair.dots) == 1
    seeds = [str(shot.row["noise_seed"]) for pair in moments[0].pairs for shot in (pair.low, pair.high)]
    body = body_of(run)
    assert all(seed in body for seed in seeds)


def test_an_invalid_candidate_is_never_shown(run: Path) -> None:
    path = run / "ledger/step-000001.parquet"
    rows = pq.read_table(path).to_pylist()
    rows = [row | ({"valid": False, "reward": None} if row["group"] == 0 else {}) for row in rows]
    table(rows, path)
    moments, _ = noise_section(load_run(run))
    assert all(pair.group != 0 for pair in moments[0].pairs)


def test_held_out_compares_the_same_noise(run: Path) -> None:
    section, notes = held_out_section(load_run(run))
    assert notes == []
    assert section is not None
    assert (section.first, section.last, len(section.cards), section.compared) == (0, 40, 16, 40)
    assert section.tally["improved"] > section.tally["worse"]
    assert all(card.change == direction(*card.rewards) for card in section.cards)
    rows = pq.read_table(run / "eval/step-000040.parquet").to_pylist()
    table([row | {"noise_seed": row["noise_seed"] + 1} for row in rows], run / "eval/step-000040.parquet")
    assert "different noise" in held_out_section(load_run(run))[1][0]


def test_an_interrupted_run_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=3, evaluations=(0,))
    (folder / "ledger/step-000001.parquet").write_bytes(b"PAR1")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    body = body_of(folder)
    for text in ("step 3 of 40", "checkpoint is that of step 3", "line 5", "Only one", "no readable ledger"):
        assert text in body


@pytest.mark.parametrize(
    ("remove", "text"),
    [
        ("config.toml", "There is no config.toml"),
        ("metrics.jsonl", "There is no metrics.jsonl"),
        ("images", "No images of training steps were saved"),
        ("ledger", "no readable ledger"),
        ("eval", "No table of held-out images"),
        ("images/eval-000040", "held-out images of the evaluations were not saved"),
    ],
)
def test_a_missing_part_is_named(run: Path, remove: str, text: str) -> None:
    path = run / remove
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert text in body_of(run)


def test_a_run_that_has_just_begun_has_a_page_and_a_table(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("preset = [")
    assert "config.toml could not be read" in body_of(tmp_path)
    Console(quiet=True).print(summary_table(tmp_path))


def test_damaged_images_and_empty_tables_do_not_stop_the_page(run: Path) -> None:
    for path in run.glob("images/*/*1.png"):
        path.write_bytes(path.read_bytes()[:40])
    (run / "eval/step-000040.parquet").write_bytes(b"")
    body = body_of(run)
    assert "evaluation at step 40 could not be read" in body
    assert "step 30" in body


def test_not_finite_metrics_are_gaps(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {"loss": math.nan, "grad_norm": math.inf})
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert "NaN" not in body_of(run)
    costs = {cost.name: cost.candidates for cost in stage_costs(load_run(run))}
    assert costs["learn"] == costs["select"] - GROUPS * KEEP


def rewritten(run: Path, **changes: object) -> Path:
    """Change metrics in every step of the run."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) | changes for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_run_that_learned_nothing_is_no_success(run: Path) -> None:
    dry = {"zero_margin_groups": GROUPS, "tied_low": 0.5, "tied_high": 0.5, "loss": None}
    body = body_of(rewritten(run, updates=0, **dry))
    assert "Nothing was learned, since no update was applied in 40 steps: in 240 of 240 groups all" in body
    assert "candidates tied at a reward of 0.5" in body
    assert "held-out reward rose" not in body
    assert "Nothing was learned" not in body_of(rewritten(run, updates=1))


def test_images_that_were_not_finite_are_told_and_are_no_reward(run: Path) -> None:
    body = body_of(rewritten(run, broken_images=2, eval_broken_images=1))
    assert "82 images of training were not finite" in body
    assert "41 held-out images were not finite" in body
    assert "eval_broken_images" not in [item.key for item in changes(load_run(run))]
    assert "held-out broken" not in body


def test_a_resumed_step_counts_once(run: Path) -> None:
    path = run / "metrics.jsonl"
    before = stage_costs(load_run(run))
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    assert stage_costs(load_run(run)) == before


def test_hostile_text_stays_text(run: Path) -> None:
    path = run / "ledger/step-000001.parquet"
    table([row | {"prompt": "</script><b>x"} for row in pq.read_table(path).to_pylist()], path)
    (run / "config.toml").write_text('preset = "<i>t</i>"\nsteps = 40\n')
    body = body_of(run)
    assert "<b>x" not in body
    assert "<i>t</i>" not in body


def test_large_images_become_small_thumbnails(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(512, 512, 3), dtype=np.uint8)
    save(noise, tmp_path / "big.png")
    save(noise[:16, :48], tmp_path / "small.png")
    big, small = picture(tmp_path / "big.png"), picture(tmp_path / "small.png")
    assert big is not None
    assert small is not None
    assert (big.width, big.height, big.exact) == (THUMBNAIL, THUMBNAIL, False)
    assert len(big.uri) < THUMBNAIL_BYTES * 4 / 3 + 40
    assert (small.width, small.height, small.exact) == (48, 16, True)


@pytest.mark.parametrize("name", ["nowhere", ""])
def test_a_folder_that_is_no_run_is_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"error: {tmp_path}")
    with pytest.raises(NotARunError):
        write_report(tmp_path / name)


def test_the_command_line_remakes_the_page(run: Path) -> None:
    command = [sys.executable, "-m", "cluster.report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(run / "report.html")


def test_summary_table_names_start_end_and_change(run: Path) -> None:
    console = Console(width=100, record=True, quiet=True)
    console.print(summary_table(run))
    keys = [item.key for item in changes(load_run(run))]
    assert keys[:3] == ["eval_reward", "eval_strict", "eval_composition"]
    table_ = summary_table(run)
    assert [column.header for column in table_.columns] == ["", "start", "end", "change"]
    names = list(table_.columns[0].cells)
    assert names[:2] == ["held-out reward", "held-out strict"]
    assert {"sample", "learn", "whole step", "evaluation"} <= set(names)


def test_a_reward_without_a_strict_score_shows_its_wins(tmp_path: Path) -> None:
    rows = [{"step": s, "eval_reward": 20.0 + s, "eval_other": 0.5, "eval_win_rate": s * 0.9} for s in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    body = body_of(tmp_path)
    assert "Preferred to the start" in body
    assert "90%" in body
    assert "legendonly" in body


def test_palettes_can_be_swapped_by_text() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_small_parts() -> None:
    assert spread([3]) == [3]
    assert spread([1, 2, 9, 40]) == [1, 9, 40]
    assert evenly([(p, s) for p in range(4) for s in range(2)], 3) == [(0, 0), (2, 0), (3, 0)]
    assert moving_average([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
    assert within_share({0: [{"reward": 0.0}, {"reward": 1.0}], 1: [{"reward": 0.0}, {"reward": 1.0}]}) == 1.0
    assert [direction(0.5, 0.5), direction(0.2, 0.1), direction(None, 1.0)] == ["same", "worse", None]
    assert (show(0.5), show(12345), show(math.nan)) == ("0.500", "12\u2009345", MISSING)
    assert (change(1.0, 0.5), change(0.5, 1.0)) == ("\u22120.500", "+0.500")
    assert (duration(0.0204), duration(8.44), duration(187), duration(3840)) == (
        "20 ms", "8.4 s", "3 min 07 s", "1 h 04 min",
    )  # fmt: skip
