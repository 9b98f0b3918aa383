"""What the driver does by itself: the evaluation's numbers, the lines it prints, and the plan."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from cluster.actors.actor_spec import connect
from cluster.config.errors import UserError
from cluster.config.preflight import Inputs, check, memory_gb, plan, processes
from cluster.config.settings import ClusterSettings
from cluster.loop.evaluation import evaluate, held_out
from cluster.record.run_folder import RunFolder
from cluster.trackers.display import Display, describe
from rewards.combine import Scores
from rollout.records import Prompt, Weights

PROMPTS = tuple(Prompt(index=index, text=f"prompt {index}") for index in range(5))
METRICS = {
    "step": 4, "reward_mean": 0.51234, "margin_mean": 0.25, "seconds_step": 3.21, "seconds_sample": 1.04,
    "seconds_score": 0.5, "seconds_select": 0.0, "seconds_learn": 1.6, "seconds_broadcast": 0.12,
}  # fmt: skip
EVALUATED = {**METRICS, "eval_reward": 0.75, "eval_strict": 0.5}


def test_held_out_noise_is_fixed_and_everyones_own(configure: Any) -> None:
    drawn = held_out(PROMPTS, configure(eval_samples=3))
    assert {(prompt.index, sample) for prompt, sample, _ in drawn} == {
        (p, s) for p in range(5) for s in range(3)
    }
    seeds = {noise.initial for _, _, noise in drawn}
    assert len(seeds) == len(drawn) == 15
    assert drawn == held_out(PROMPTS, configure(eval_samples=3, steps=9))
    assert not seeds & {noise.initial for _, _, noise in held_out(PROMPTS, configure(eval_samples=3, seed=1))}


class Stand:
    """Samplers that answer with the prompts' numbers, and judges that return what they are told to.

    Images of the ``broken`` prompts are not finite.
    """

    def __init__(self, values: list[float], strict: bool, broken: Sequence[int] = ()) -> None:
        self.values, self.strict, self.sizes = np.array(values), strict, []
        self.broken = broken
        self.rollouts = self.rewards = self

    async def evaluate(self, prompts: list[Prompt], noises: Any, weights: Weights) -> Any:
        self.sizes.append(len(prompts))

        async def images() -> Any:
            return np.zeros((len(prompts), 4, 4, 3), dtype=np.uint8)

        return tuple(prompt.index not in self.broken for prompt in prompts), images()

    async def judge(self, images: Any, prompts: list[Prompt], finite: Sequence[bool]) -> Scores:
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
) -> dict[str, float]:
    stages: Any = Stand(values, strict, **broken)
    weights = Weights(version=-1, checksums=(), parts=())
    metrics = asyncio.run(
        evaluate(stages, RunFolder(folder), step, held_out(PROMPTS, configure()), weights, 2)
    )
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
    """Also where all images of a batch are broken, so that nobody gives it a verdict."""
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


def test_a_step_is_one_line_with_its_seconds() -> None:
    assert describe(METRICS) == (
        "reward 0.512  margin 0.250  3.2 s (sample 1.0 score 0.5 select 0.0 learn 1.6 broadcast 0.1)"
    )
    assert describe(EVALUATED).endswith("held-out 0.750, strict 0.500")
    assert describe({**METRICS, "eval_reward": 0.75}).endswith("held-out 0.750")


def shown(*lines: dict[str, Any], terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=150, color_system=None)
    with Display(console, steps=9, start=0) as display:
        for line in lines:
            display.step(line)
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    output = shown({"step": 0, "eval_reward": 0.25}, METRICS, terminal=False)
    assert output.splitlines() == ["start: held-out 0.250", f"step 4/9  {describe(METRICS)}"]


def test_a_live_line_in_a_terminal() -> None:
    output = shown({"step": 0, "eval_reward": 0.25}, EVALUATED, terminal=True)
    assert "4/9" in output
    assert "reward 0.512  margin 0.250" in output
    assert "step 4: held-out 0.750, strict 0.500" in output


def test_a_step_without_a_valid_reward_can_be_shown() -> None:
    assert "reward nan" in describe({**METRICS, "reward_mean": float("nan")})


def plan_of(settings: Any) -> dict[str, str]:
    table = plan(settings, Inputs(train=PROMPTS * 4, held_out=PROMPTS))
    names, values = (list(column.cells) for column in table.columns)
    return dict(zip(map(str, names), map(str, values), strict=True))


def test_the_plan_counts_what_a_step_does(configure: Any) -> None:
    settings = configure(
        groups_per_step=6, eval_samples=2, selection={"candidates": 10, "keep": 4},
        rollout={"steps": 7, "guidance": 4.5, "workers": 3}, learner={"ranks": 2, "updates": 2},
    )  # fmt: skip
    found = plan_of(settings)
    assert found["prompts"] == "6 of 20"
    assert found["candidates sampled"] == "60 (10 per prompt)"
    assert found["batches of them"] == "4 of at most 16, for 3 samplers"
    assert found["candidates trained, at most"] == "24 (4 per prompt)"
    assert found["transformer passes, sampling"] == str(60 * 7 * 2)
    assert found["transformer passes, training"] == str(24 * 6 * 2)
    assert found["optimizer steps"] == "2"
    assert found["held-out images"] == "10"
    assert found["processes"] == "1 ray, 3 rollout, 1 reward, 1 selector, 1 observer, 2 learner"


def test_the_plan_follows_guidance_and_window(configure: Any) -> None:
    found = plan_of(configure(rollout={"steps": 7, "guidance": 1.0, "window_size": 2}))
    assert found["transformer passes, sampling"] == str(8 * 16 * 7)
    assert found["transformer passes, training"] == str(8 * 8 * 2)


def test_a_reward_that_trains_and_judges_has_one_pool(configure: Any) -> None:
    listed = [{"name": "shapes", "workers": 2}]
    assert processes(configure(rewards=listed, eval_rewards=listed))["reward"] == 2
    assert processes(configure(rewards=listed, eval_rewards=[{"name": "jpeg"}]))["reward"] == 3


def test_memory_grows_with_processes_and_weights(configure: Any, model_folder: Path) -> None:
    small = memory_gb(configure())
    assert memory_gb(configure(rollout={"workers": 4})) > small
    assert memory_gb(configure(learner={"ranks": 2})) > small
    assert memory_gb(configure(cluster={"object_store_gb": 3.0})) == pytest.approx(small + 2)
    with (model_folder / "transformer" / "w.safetensors").open("wb") as file:
        file.truncate(10**9)
    assert memory_gb(configure()) == pytest.approx(small + 2 + 4)


def test_memory_of_another_machine_is_not_ours_to_judge(configure: Any, set_free_memory: Any) -> None:
    set_free_memory(0.1)
    assert check(configure(cluster={"address": "ray://somewhere:10001"})).train
    set_free_memory(64)
    assert check(configure()).held_out


@pytest.mark.parametrize("error", [Exception("the node timed out"), ConnectionError("no route")])
def test_a_ray_that_does_not_come_up_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr("cluster.actors.actor_spec.check_answers", lambda address: None)
    with pytest.raises(UserError, match=f"^cluster.address: cannot reach Ray at there:1: {error}$"):
        connect(ClusterSettings(address="there:1"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=f"^cannot start a Ray node on this machine: {error}$"):
        connect(ClusterSettings(object_store_gb=0.08))
