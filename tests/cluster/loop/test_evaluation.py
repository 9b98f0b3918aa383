"""Evaluations: means over valid scores, wins over the start, and broken images."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.config.settings import RunSettings
from cluster.loop.evaluation import Evaluation
from cluster.loop.production import consecutive
from cluster.loop.run import Run
from cluster.record.held_out import held_out
from cluster.record.run_folder import RunFolder
from rewards.combine import Scores
from rollout.records import Weights
from tests.support.fake_stages import PROMPTS, FakeStages


class Judged(FakeStages):
    """Held-out images with the given scores; those of the ``broken`` prompts are not finite."""

    def __init__(
        self, settings: RunSettings, values: list[float], strict: bool, broken: Sequence[int] = ()
    ) -> None:
        super().__init__(settings)
        self.values, self.strict, self.broken = np.array(values), strict, broken
        self.sizes: list[int] = []

    async def draw(self, weights: Weights, prompts: Any, noises: Any) -> Any:
        self.sizes.append(len(prompts))
        finite = tuple(prompt.index not in self.broken for prompt in prompts)
        return finite, np.zeros((len(prompts), 4, 4, 3), dtype=np.uint8)

    async def score_held_out(self, images: Any, prompts: Any, finite: Sequence[bool]) -> Scores:
        found = np.where(finite, self.values[[prompt.index for prompt in prompts]], np.nan)
        verdict = np.where(np.isfinite(found), found == 1, np.nan)
        strict = verdict if self.strict and any(finite) else None
        return Scores(
            rewards={"one": found, "two": 2 * found},
            weights={"one": 1.0, "two": 0.0},
            valid=np.isfinite(found),
            total=found,
            strict=strict,
        )


def evaluated(
    folder: Path, step: int, configure: Any, values: list[float], strict: bool = True, **broken: Any
) -> dict[str, Any]:
    settings = configure(steps=3, rollout={"batch": 2})
    stages = Judged(settings, values, strict, **broken)
    observer = Evaluation(RunFolder(folder), held_out(PROMPTS, settings))
    run = Run(settings, PROMPTS, stages, consecutive(settings), [observer])
    metrics: dict[str, Any] = {}
    asyncio.run(observer.after(run, step, None, metrics))
    assert sum(stages.sizes) == len(PROMPTS) * 4
    assert max(stages.sizes) <= 2
    return metrics


def test_evaluation_averages_what_is_valid_and_counts_wins(tmp_path: Path, configure: Any) -> None:
    first = evaluated(tmp_path, 0, configure, [0.0, 0.5, 0.5, 1.0, 0.5])
    assert (first["eval_reward"], first["eval_strict"], first["eval_win_rate"]) == (0.5, 0.2, 0.0)
    later = evaluated(tmp_path, 3, configure, [1.0, 0.6, np.nan, 1.0, 0.2])
    assert later["eval_reward"] == pytest.approx(0.7)
    assert later["eval_two"] == pytest.approx(1.4)
    assert later["eval_win_rate"] == pytest.approx(0.5)  # a missing reward neither wins nor loses
    assert later["eval_broken_images"] == 0
    assert later["seconds_eval"] > 0


def test_held_out_images_that_are_not_finite_are_counted_and_kept_by_name(
    tmp_path: Path, configure: Any
) -> None:
    """Also if all images of a batch are broken, so that none has a strict score."""
    values = [0.0, 0.5, 0.5, 1.0, 0.5]
    evaluated(tmp_path, 0, configure, values)
    found = evaluated(tmp_path, 3, configure, values, broken=[0, 1, 4])
    assert found["eval_broken_images"] == 3 * 4
    assert found["eval_reward"] == pytest.approx(0.75)
    assert found["eval_strict"] == pytest.approx(0.5)
    assert found["eval_win_rate"] == 0.0
    shown = {path.name[:4] for path in (tmp_path / "images" / "eval-000003").iterdir()}
    assert shown == {"p002", "p003"}
    (line,) = map(json.loads, (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert (line["step"], len(line["eval_images"])) == (3, 12)
    prompt, sample, noise = held_out(PROMPTS, configure())[0]
    assert line["eval_images"][0] == {
        "prompt_index": prompt.index, "sample": sample, "prompt": prompt.text, "initial": noise.initial,
    }  # fmt: skip
    rows = pq.read_table(tmp_path / "eval" / "step-000003.parquet").to_pylist()
    assert {row["prompt_index"] for row in rows if row["reward"] is None} == {0, 1, 4}


def test_evaluation_without_a_verdict_reports_none(tmp_path: Path, configure: Any) -> None:
    metrics = evaluated(tmp_path, 0, configure, [0.0, 0.5, 0.5, 1.0, 0.5], strict=False)
    assert "eval_strict" not in metrics
