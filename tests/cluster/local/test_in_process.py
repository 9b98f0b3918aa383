"""The stages in one process: counts of computation, and evaluations without side effects."""

from __future__ import annotations

import asyncio
import shutil
from typing import Any

import numpy as np
import pytest

from cluster.config.preflight import Inputs, check
from cluster.config.settings import RunSettings
from cluster.config.sources import resolve
from cluster.local.in_process import LocalRewards, load_scorers
from cluster.study.compare import run_arm
from rollout.noise import candidate_noises
from rollout.prompts import prompt_at
from rollout.records import Chunk
from tests.support.poisoned import PoisonedSampler, is_poisoned

SMALL: dict[str, Any] = {
    "groups_per_step": 2,
    "steps": 2,
    "eval_samples": 1,
    "selection": {"candidates": 6, "keep": 4},
    "rollout": {"steps": 4, "eval_steps": 2},
    "learner": {"threads": 1},
}


def run(inputs: tuple[RunSettings, Inputs], **overrides: Any) -> list[dict[str, Any]]:
    settings, found = inputs
    changed = settings.model_copy(update=overrides)
    return run_arm(changed, settings.groups_per_step, found, load_scorers(settings))


@pytest.fixture
def inputs(process_group: None) -> tuple[RunSettings, Inputs]:
    settings = resolve("shapes", SMALL)
    found = check(settings)
    return settings, Inputs(found.train, found.held_out[:3])


def test_costs_are_counted(inputs: tuple[RunSettings, Inputs]) -> None:
    _, row, _ = run(inputs)
    assert row["sampled"] == row["decodes"] == row["scores"] == 12
    assert row["trained"] == row["selected"] <= 8
    assert row["backwards"] == 3 * row["trained"]
    assert row["forwards"] == 4 * 12 + row["backwards"]
    for stage in ("sample", "score", "learn"):
        assert row[f"cpu_seconds_{stage}"] > 0
        assert row[f"seconds_{stage}"] > 0


def test_evaluations_do_not_disturb_training(inputs: tuple[RunSettings, Inputs]) -> None:
    often, seldom = run(inputs, eval_every=1), run(inputs, eval_every=2)
    assert "eval_reward" in often[1]
    assert "eval_reward" not in seldom[1]
    for one, other in zip(often, seldom, strict=True):
        assert timeless(one) == timeless(other)
    assert {"eval_reward", "eval_strict", "eval_shapes", "eval_diversity", "seconds_eval"} <= set(often[0])


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if "seconds" not in k and not k.startswith("eval_")}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_compute_the_same(inputs: tuple[RunSettings, Inputs]) -> None:
    settings, _ = inputs
    compiled = settings.model.model_copy(update={"compile": True})
    for expected, row in zip(run(inputs)[1:], run(inputs, model=compiled)[1:], strict=True):
        assert row["ratio_max_deviation"] < 1e-5
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-2, abs=1e-5)
        assert row["forwards"] == expected["forwards"]


def test_images_that_are_not_finite_are_missing(
    inputs: tuple[RunSettings, Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.local.in_process.RolloutWorker", PoisonedSampler)
    settings, found = inputs
    noises = [
        noise
        for group in (0, 1)
        for prompt in [prompt_at(found.train, settings.seed, group)]
        for noise in candidate_noises(settings.seed, prompt.index, group, 6)
    ]
    broken = sum(is_poisoned(noise.initial) for noise in noises)
    start, row, _ = run(inputs)
    assert row["broken_images"] == 12 - row["valid"] == broken > 0
    assert 0 <= start["eval_broken_images"] <= 3
    assert np.isfinite(start["eval_reward"]) == (start["eval_broken_images"] < 3)


def test_rewards_are_combined_as_in_the_service() -> None:
    rewards = [{"name": "size", "scorer": "jpeg"}, {"name": "shapes", "weight": 0.5}]
    settings = resolve("shapes", {"rewards": rewards, "combine": "standardised"})
    rewards = LocalRewards(settings, load_scorers(settings))
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    images[:2] //= 4
    prompt = check(settings).train[0]
    chunk = Chunk(images=images, finite=(True,) * 4, conditioning=None, trajectories=(None,) * 4, seconds=0)

    async def sampled() -> Chunk:
        return chunk

    async def scored() -> Any:
        return await rewards.score(prompt, [sampled()])

    found = asyncio.run(scored())
    sizes = found.rewards["size"]
    assert np.ptp(sizes) > 0
    assert np.ptp(found.rewards["shapes"]) == 0  # so it adds nothing
    assert found.total == pytest.approx((sizes - sizes.mean()) / sizes.std())
    assert rewards.raw(images, [prompt] * 4, chunk.finite).total == pytest.approx(
        sizes + 0.5 * found.rewards["shapes"]
    )
