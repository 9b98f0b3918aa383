"""The study: its files, the results computed from them, and its commands from end to end."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config.errors import UserError
from cluster.study.__main__ import main
from cluster.study.compare import highest
from cluster.study.designs import load_drafts, load_variance
from cluster.study.findings import Finding, findings
from cluster.study.report import write_study
from cluster.study.results import compare_arms, load_runs, load_tuning
from cluster.study.store import finished, read_rows, write_rows
from tests.support.paths import ROOT
from tests.support.study_files import write_study_files, write_variance


def test_rows_come_back_with_what_they_are_about(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.parquet"
    rows: list[dict[str, Any]] = [{"step": 0, "eval_reward": 0.5}, {"step": 1, "loss": 2.0}]
    write_rows(path, rows, {"arm": "flowgrpo", "config": "x = 1"})
    found, about = read_rows(path)
    assert found == [
        {"step": 0, "eval_reward": 0.5, "loss": None},
        {"step": 1, "eval_reward": None, "loss": 2.0},
    ]
    assert about["arm"] == "flowgrpo"
    assert about["cores"] == os.cpu_count()
    assert [p.name for p in path.parent.iterdir()] == ["rows.parquet"]


def test_a_run_is_finished_for_its_own_settings_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    assert not finished(path, {"config": "steps = 3"})
    write_rows(path, [{"step": 0}], {"config": "steps = 3"})
    assert finished(path, {"config": "steps = 3"})
    with pytest.raises(UserError, match="other settings; choose another --folder"):
        finished(path, {"config": "steps = 4"})


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"step": [0]}), tmp_path / "variance.parquet")
    with pytest.raises(UserError, match=r"variance\.parquet: not written by the study"):
        load_variance(tmp_path)
    (tmp_path / "variance.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"variance\.parquet: cannot read"):
        load_variance(tmp_path)


def test_a_planted_speedup_is_read_on_every_axis(tmp_path: Path) -> None:
    write_study_files(tmp_path)
    found = {one.arm: one for one in compare_arms(load_runs(tmp_path))}
    assert list(found) == ["flowgrpo", "noise_margin_2x", "random_2x"]
    ratios = {axis: s.ratio.value for axis, s in found["noise_margin_2x"].speedups.items()}
    assert ratios["steps"] == pytest.approx(2.0, rel=0.05)
    assert ratios["trained"] == pytest.approx(ratios["steps"])
    assert ratios["sampled"] == pytest.approx(ratios["steps"] / 2)
    assert ratios["compute"] == pytest.approx(ratios["steps"] * (704 + 640) / (1088 + 640))
    assert ratios["cpu_seconds"] == pytest.approx(ratios["steps"] * 3 / 4)
    assert found["flowgrpo"].speedups["steps"].ratio.value == pytest.approx(1.0)
    assert found["noise_margin_2x"].seeds == 5
    assert set(found["flowgrpo"].finals) == {"eval_reward", "eval_strict", "eval_diversity"}
    assert found["noise_margin_2x"].differences["eval_reward"].low > 0


def test_arms_are_paired_by_the_seeds_they_share(tmp_path: Path) -> None:
    write_study_files(tmp_path, seeds=3)
    (tmp_path / "compare" / "random_2x" / "seed-1.parquet").unlink()
    found = {one.arm: one.seeds for one in compare_arms(load_runs(tmp_path))}
    assert found == {"flowgrpo": 3, "noise_margin_2x": 3, "random_2x": 2}


def test_a_learning_rate_that_ends_without_a_reward_is_never_the_best() -> None:
    assert highest({1e-3: math.nan, 3e-4: 0.4, 1e-4: 0.6}) == 1e-4
    assert highest({1e-4: 0.6, 1e-3: math.nan}) == 1e-4
    with pytest.raises(UserError, match=r"none of 0\.001, 0\.0003 ends with a held-out reward"):
        highest({1e-3: math.nan, 3e-4: math.nan})


def test_prompts_with_missing_rewards_are_left_out_and_counted(tmp_path: Path) -> None:
    write_variance(tmp_path)
    found = load_variance(tmp_path)
    assert found is not None
    assert (found.design, found.dropped) == ((11, 4, 4), 1)
    assert found.raw["path"].share > 0.5
    assert found.normalised["prompt"].share == 0.0
    assert found.gradients is not None
    assert found.gradients.split.prompts == 5
    assert sum(found.gradients.shares.values()) == pytest.approx(1.0)
    assert load_variance(tmp_path / "nothing") is None


def test_the_report_is_remade_from_the_files(tmp_path: Path) -> None:
    write_study_files(tmp_path / "study" / "shapes")
    results, page = write_study(tmp_path / "study", tmp_path / "RESULTS.md")
    text, html = results.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
    for said in (
        "23.14 against 22.92",
        "5 of 5",
        "1 prompts with missing rewards",
        "seeds 0, 1, 2, 3, 4",
        "2.2 times",
    ):
        assert said in text
    assert "- `python -m cluster.study compare shapes --seeds 5` on" in text
    assert "--seeds 3" not in text
    figures = json.loads(html.split('id="figures">')[1].split("</script>")[0])
    assert {"shapes-variance", "shapes-ranks", "shapes-ratios", "shapes-steps", "shapes-compute"} <= set(
        figures
    )
    for key in figures:
        assert f'id="plot-{key}"' in html
    assert "http://" not in html.split("<script>")[0]
    again, _ = write_study(tmp_path / "study", tmp_path / "RESULTS.md")
    assert again.read_text(encoding="utf-8") == text


def test_tables_of_results_have_as_many_cells_in_every_row(tmp_path: Path) -> None:
    write_study_files(tmp_path / "study" / "shapes", seeds=1)
    results, _ = write_study(tmp_path / "study", tmp_path / "RESULTS.md")
    for block in results.read_text(encoding="utf-8").split("\n\n"):
        widths = {line.count(" | ") for line in block.splitlines() if line.startswith("| ")}
        assert len(widths) <= 1


def test_no_results_are_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "has no results in a task's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "shapes", "--arms", "flowgrpo,magic"], "no arm 'magic'"),
        (["variance", "shapes", "--prompts", "500"], "has 122 prompts, and the design needs 500"),
        (["variance", "shape"], "no preset or TOML file 'shape'"),
        (["compare", "shapes", "--speed", "9"], "--speed"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--folder", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.parquet"))


def test_the_command_line_stays_light() -> None:
    probe = (
        "import sys, cluster.study.__main__; sys.exit({'torch', 'diffusers', 'ray'} & set(sys.modules) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("process_group")
def test_a_whole_study_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sample a design, compare two arms, stop in between, resume and report."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 0
        return capsys.readouterr().out

    folder = tmp_path / "study" / "shapes"
    small = (
        "--folder",
        str(folder),
        "--rollout.steps",
        "4",
        "--rollout.eval_steps",
        "2",
        "--learner.threads",
        "1",
    )
    design = ("--prompts", "3", "--initial", "2", "--paths", "2", "--gradients", "3")
    said = run("variance", "shapes", *design, *small)
    assert "3 prompts x 2 initial noises x 2 SDE paths" in said
    assert "the design is sampled already" in run("variance", "shapes", *design, *small)
    seeds = {
        tuple(row[name] for name in ("initial", "initial_seed"))
        for row in read_rows(folder / "variance.parquet")[0]
    }
    assert len(seeds) == 2  # the same two initial noises under all prompts

    ode = ("--rollout.dynamics", "ode", "--learner.objective.name", "nft")
    said = run("variance", "shapes", *design, *small, *ode)
    assert "3 prompts x 2 initial noises x 2 repetitions by the ODE" in said
    found = load_variance(folder, "ode")
    assert found is not None
    assert found.gradients is None
    assert found.raw["path"].variance == 0
    assert found.raw["interaction"].variance > 0
    assert load_variance(folder) != found

    assert "Drafts of stochastic candidates" in run("preview", "shapes", "--prompts", "4", *small)
    drafts = load_drafts(folder, "sde")
    # The last of four steps is an ODE step: the image itself.
    kinds = [("path", 1), ("path", 2), ("path", 3), ("ode", 1), ("ode", 2), ("ode", 3)]
    assert [key[:2] for key in drafts] == kinds
    assert drafts[("path", 1, 1.0)] == drafts[("ode", 1, 1.0)]  # the same image
    assert "Drafts of an ODE's candidates" in run("preview", "shapes", "--prompts", "4", *small, *ode)
    assert [key[:2] for key in load_drafts(folder, "ode")] == kinds
    assert "scored already" in run("preview", "shapes", "--prompts", "4", *small)

    training = ("--steps", "2", "--groups_per_step", "2", "--selection.keep", "4", "--eval_samples", "1")
    arms = ("compare", "shapes", "--seeds", "1", *small, *training)
    assert "1 runs, 0 of them finished" in run(*arms, "--arms", "flowgrpo")
    before = (folder / "compare" / "flowgrpo" / "seed-0.parquet").stat().st_mtime_ns
    assert "2 runs, 1 of them finished" in run(*arms, "--arms", "flowgrpo,noise_margin_2x")
    assert (folder / "compare" / "flowgrpo" / "seed-0.parquet").stat().st_mtime_ns == before
    runs = load_runs(folder)
    starts = [found[0].rows[0]["eval_reward"] for found in runs.values()]
    assert starts[0] == starts[1]  # same weights, prompts and evaluation noise
    assert [row["sampled"] for row in runs["noise_margin_2x"][0].rows[1:]] == [16, 16]
    assert np.isfinite([row["eval_reward"] for row in runs["flowgrpo"][0].rows]).all()
    run(*arms, "--arms", "screened_4x,flowgrpo_early")
    costs = {arm: found[0].rows[1] for arm, found in load_runs(folder).items()}
    backwards = {arm: row["backwards"] for arm, row in costs.items()}
    # Two groups: 16 begun with half of the steps, 4 finished.
    assert costs["screened_4x"]["forwards"] - backwards["screened_4x"] == 2 * (2 * 16 + 2 * 4)
    assert costs["screened_4x"]["scores"] == costs["screened_4x"]["decodes"] == 2 * (16 + 4)
    # All four steps of 4 candidates sampled, two of them trained.
    assert (costs["flowgrpo_early"]["forwards"], backwards["flowgrpo_early"]) == (2 * 4 * (4 + 2), 2 * 4 * 2)
    tuned = tmp_path / "study" / "tuned"
    tries = [*arms, "--arms", "flowgrpo", "--rates", "3e-4,1e-3", "--folder", str(tuned)]
    said = run(*tries)
    finals = {rate: tried["flowgrpo"][0].final for rate, tried in load_tuning(tuned).items()}
    best = max(finals, key=finals.__getitem__)
    assert list(finals) == [3e-4, 1e-3]
    assert f"learning rates: flowgrpo {best:g}\n1 runs, 1 of them finished" in said
    assert load_runs(tuned)["flowgrpo"][0].learning_rate == best
    assert run(*tries).count("1 runs, 1 of them finished") == 3
    run("report", str(tmp_path / "study"), "--results", str(tmp_path / "RESULTS.md"))
    assert "**Learning rates.**" in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "noise_margin_2x" in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")


def found_in(runs: Any) -> dict[str, Finding]:
    """The findings of one task, by their names."""
    return {one.about: one for one in findings({"shapes": compare_arms(runs)}, {"shapes": runs})}


def test_the_findings_are_those_of_the_planted_arms(tmp_path: Path) -> None:
    write_study_files(tmp_path)
    found = found_in(load_runs(tmp_path))
    assert list(found) == [
        "margin", "against random_2x", "best steps", "best compute", "best cpu_seconds", "independent checks",
    ]  # fmt: skip
    assert (found["margin"].numbers["above one"], found["margin"].numbers["of"]) == (1, 1)
    assert found["against random_2x"].numbers == {"ahead": 1, "apart": 1, "higher": 1, "of": 1}
    assert found["best steps"].numbers == {"shapes": "noise_margin_2x"}
    assert all(one.sentence.endswith(".") for one in found.values())
    assert findings({}, {}) == []


def test_an_arm_that_trains_more_is_no_best_arm(tmp_path: Path) -> None:
    write_study_files(tmp_path)
    runs = load_runs(tmp_path)
    more = {
        seed: replace(run, rows=[{**row, "trained": 2 * (row.get("trained") or 0)} for row in run.rows])
        for seed, run in runs["noise_margin_2x"].items()
    }
    alone = {"flowgrpo": runs["flowgrpo"], "all_2x": more}
    assert found_in(alone)["best steps"].numbers == {"shapes": "flowgrpo"}
    both = {**alone, "noise_margin_2x": runs["noise_margin_2x"]}
    assert found_in(both)["best steps"].numbers == {"shapes": "noise_margin_2x"}


def test_the_findings_pair_an_objectives_margin_with_its_control(tmp_path: Path) -> None:
    write_study_files(tmp_path)
    runs = load_runs(tmp_path)
    base, fast, slow = runs["flowgrpo"], runs["noise_margin_2x"], runs["random_2x"]
    given = {"flowgrpo": base, "nft": slow, "nft_margin_2x": fast, "nft_random_2x": slow}
    found = found_in(given)
    assert found["nft"].numbers == {"higher": 1, "of": 1}
    assert "awm" not in found
    assert "against nft_margin_2x_own_noise" not in found
    assert not any(name.startswith("against Sol-RL") for name in found)
    more = found_in({**given, "nft_margin_2x_own_noise": fast, "nft_sol_rl": slow})
    assert more["against nft_margin_2x_own_noise"].numbers == {"higher": 0, "of": 1}
    assert more["against Sol-RL as published"].numbers == {"less": 1, "of": 1}
    cheap = found_in({**given, "nft_fast_sol_rl": fast})
    assert cheap["against Sol-RL in cheap steps"].numbers == {"less": 0, "of": 1}


def test_the_findings_set_cheap_steps_beside_their_control(tmp_path: Path) -> None:
    write_study_files(tmp_path)
    runs = load_runs(tmp_path)
    base, fast, slow = runs["flowgrpo"], runs["noise_margin_2x"], runs["random_2x"]
    given = {"flowgrpo": base, "nft_fast": fast}
    assert "nft_fast" not in found_in(given)  # without its control
    assert found_in({**given, "nft_fast_random": slow})["nft_fast"].numbers == {"higher": 1, "of": 1}
    assert found_in({**given, "nft_fast_random": fast})["nft_fast"].numbers == {"higher": 0, "of": 1}


def test_the_findings_pair_early_noise_with_a_baseline_confined_alike(tmp_path: Path) -> None:
    write_study_files(tmp_path)
    runs = load_runs(tmp_path)
    margin = runs["noise_margin_2x"]
    found = found_in({**runs, "screened_4x_margin_2x_early": margin, "flowgrpo_early": margin})
    assert found["early"].numbers == {"higher": 0, "of": 1}
    assert "early" not in found_in({**runs, "screened_4x_margin_2x_early": margin})  # no control, no finding
