"""The stages in one process: the maths of the service, and counts of what was computed."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from cluster.config.preflight import Inputs, check
from cluster.config.settings import RunSettings, resolve
from cluster.local.in_process import Solo, diversity, load_scorers, score
from cluster.loop.evaluation import held_out
from rollout.noise import candidate_noises
from rollout.prompts import prompt_at
from rollout.records import Prompt
from tests.support.poisoned import PoisonedSampler, is_poisoned

SMALL: dict[str, Any] = {
    "groups_per_step": 2,
    "selection": {"candidates": 6, "keep": 4},
    "rollout": {"steps": 4, "eval_steps": 2},
    "learner": {"threads": 1},
}


@pytest.fixture
def inputs(process_group: None) -> tuple[RunSettings, Inputs]:
    settings = resolve("shapes", SMALL)
    return settings, check(settings)


def solo(inputs: tuple[RunSettings, Inputs]) -> Solo:
    settings, found = inputs
    return Solo(settings, found.train, load_scorers(settings))


def test_a_run_is_that_of_a_bare_loop(inputs: tuple[RunSettings, Inputs]) -> None:
    """Without DeepSpeed and with an optimizer of its own, the same rewards come out after two updates."""
    from cluster.bench.overhead import BareLoop

    settings, found = inputs
    ours, bare = solo(inputs), BareLoop(settings, found.train)
    for step in range(3):
        row = ours.step(step, range(2 * step, 2 * step + 2))
        assert row["reward_mean"] == pytest.approx(bare.step(step).mean(), abs=1e-6)


def test_costs_are_counted(inputs: tuple[RunSettings, Inputs]) -> None:
    row = solo(inputs).step(0, [0, 1])
    assert row["sampled"] == row["decodes"] == row["scores"] == 12
    assert row["trained"] == row["selected"] <= 8
    assert row["backwards"] == 3 * row["trained"]
    assert row["forwards"] == 4 * 12 + row["backwards"]
    for stage in ("sample", "score", "learn"):
        assert 0 < row[f"cpu_seconds_{stage}"] < 60
        assert row[f"seconds_{stage}"] > 0


def test_evaluations_do_not_disturb_training(inputs: tuple[RunSettings, Inputs]) -> None:
    settings, found = inputs
    drawn = held_out(found.held_out[:3], settings)
    with_it, without = solo(inputs), solo(inputs)
    first = with_it.evaluate(0, drawn)
    assert first == pytest.approx(with_it.evaluate(0, drawn) | _seconds(first), nan_ok=True)
    timeless = [
        {k: v for k, v in one.step(0, [0, 1]).items() if "seconds" not in k} for one in (with_it, without)
    ]
    assert timeless[0] == timeless[1]
    assert {"eval_reward", "eval_strict", "eval_shapes", "eval_diversity"} <= set(first)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_compute_the_same(inputs: tuple[RunSettings, Inputs]) -> None:
    settings, found = inputs
    quick = settings.model_copy(update={"model": settings.model.model_copy(update={"compile": True})})
    plain, compiled = solo(inputs), solo((quick, found))
    for step in range(2):
        expected, row = (one.step(step, [2 * step, 2 * step + 1]) for one in (plain, compiled))
        assert row["ratio_max_deviation"] < 1e-5
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-2, abs=1e-5)
        assert row["forwards"] == expected["forwards"]


def _seconds(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if "seconds" in name}


def test_images_that_are_not_finite_are_missing(
    inputs: tuple[RunSettings, Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.local.in_process.RolloutWorker", PoisonedSampler)
    settings, found = inputs
    one = solo(inputs)
    noises = [
        noise
        for group in (0, 1)
        for prompt in [prompt_at(found.train, settings.seed, group)]
        for noise in candidate_noises(settings.seed, prompt.index, group, 6)
    ]
    broken = sum(is_poisoned(noise.initial) for noise in noises)
    row = one.step(0, [0, 1])
    assert row["broken_images"] == 12 - row["valid"] == broken > 0
    drawn = held_out(found.held_out[:3], settings)
    row = one.evaluate(0, drawn)
    good = [one for one in drawn if not is_poisoned(one[2].initial)]
    assert row["eval_broken_images"] == len(drawn) - len(good) > 0
    alone = one.evaluate(0, good)
    for name in ("eval_reward", "eval_strict", "eval_diversity"):
        assert row[name] == pytest.approx(alone[name], abs=1e-3)


def test_diversity_is_that_of_the_images_of_a_prompt() -> None:
    first, second = Prompt(index=0, text="a"), Prompt(index=1, text="b")
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    apart = np.concatenate([black, white])
    assert diversity(apart, [first, first]) == pytest.approx(np.sqrt(0.5))
    assert diversity(np.concatenate([black, black]), [first, first]) == 0.0
    assert np.isnan(diversity(apart, [first, second]))


def test_rewards_are_combined_as_in_the_service() -> None:
    rewards = [{"name": "size", "scorer": "jpeg"}, {"name": "shapes", "weight": 0.5}]
    settings = resolve("shapes", {"rewards": rewards, "combine": "standardised"})
    scorers = load_scorers(settings)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    images[:2] //= 4
    prompt = check(settings).train[0]
    found = score(scorers, settings.rewards, images, [prompt] * 4, settings.combine, finite=[True] * 4)
    sizes = found.rewards["size"]
    assert np.ptp(sizes) > 0
    assert np.ptp(found.rewards["shapes"]) == 0  # so it adds nothing
    assert found.total == pytest.approx((sizes - sizes.mean()) / sizes.std())
