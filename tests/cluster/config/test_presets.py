"""The bundled presets: all resolve, and only their values differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config.errors import UserError
from cluster.config.preflight import check
from cluster.config.settings import RunSettings
from cluster.config.sources import PRESETS, preset_names, read_toml, resolve
from rewards.registry import REWARDS
from rollout.prompts import load_prompts
from tests.support.paths import ROOT

BUNDLED = ("preference", "shapes", "words")
PUBLISHED = ("sd35-geneval", "sd35-ocr", "sd35-pickscore")
SMALL = {"width": 48, "height": 16, "gpus": 0}


def keys(values: Any, prefix: str = "") -> set[str]:
    """Yield the dotted names of all keys, those of a list by its first entry, without scorers' options."""
    if isinstance(values, list | tuple) and values:
        values = values[0]
    if not isinstance(values, dict) or prefix.endswith("options"):
        return {prefix}
    return {name for key, value in values.items() for name in keys(value, f"{prefix}.{key}".strip("."))}


def dumped(name: str) -> dict[str, Any]:
    settings = resolve(name, {"eval_rewards": [{"name": "jpeg"}]})
    return settings.model_dump(mode="json")


def test_the_promised_presets_ship() -> None:
    assert preset_names() == sorted(BUNDLED + PUBLISHED)


@pytest.mark.parametrize("name", BUNDLED + PUBLISHED)
def test_a_preset_resolves_and_says_what_it_is_for(name: str) -> None:
    assert resolve(name, {}).preset == name
    lines = (PRESETS / f"{name}.toml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 25


@pytest.mark.parametrize("name", BUNDLED + PUBLISHED)
def test_only_values_differ_between_presets(name: str) -> None:
    assert keys(dumped(name)) == keys(dumped("shapes"))


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_preset_needs_nothing_but_the_checkout(name: str) -> None:
    settings = resolve(name, {})
    assert settings.rollout.gpus == settings.learner.gpus == 0
    assert {reward.name for reward in (*settings.rewards, *settings.eval_rewards_used)} <= set(REWARDS)
    train = load_prompts(ROOT / settings.prompts.train)
    held_out = load_prompts(ROOT / settings.prompts.eval)
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}


@pytest.mark.parametrize(
    ("name", "size", "steps", "evaluation"),
    [
        ("shapes", (32, 32), 170, (34, 4)),
        ("words", (48, 16), 60, (20, 2)),
        ("preference", (32, 32), 100, (50, 4)),
    ],
)
def test_a_bundled_preset_trains_on_the_widest_margins_of_twice_the_candidates(
    name: str, size: tuple[int, int], steps: int, evaluation: tuple[int, int]
) -> None:
    settings = resolve(name, {})
    rollout, learner, selection = settings.rollout, settings.learner, settings.selection
    assert (settings.steps, settings.groups_per_step, settings.max_staleness) == (steps, 8, 0)
    assert (settings.eval_every, settings.eval_samples) == evaluation
    assert (rollout.width, rollout.height) == size
    assert (rollout.steps, rollout.eval_steps, rollout.trained_steps) == (6, 12, 5)
    assert (rollout.guidance, rollout.text_tokens, rollout.noise_level) == (1, 0, 0.7)
    assert (selection.candidates, selection.keep, selection.strategy) == (16, 8, "noise_margin")
    objective: Any = learner.objective
    assert (learner.learning_rate, learner.updates, objective.clip) == (3e-4, 2, 1e-3)
    assert (learner.micro_batch, objective.beta) == (80, 0)
    assert (rollout.workers, learner.ranks, learner.threads) == (2, 1, 2)


@pytest.mark.parametrize(
    ("name", "beta"), [("sd35-geneval", 0.04), ("sd35-ocr", 0.04), ("sd35-pickscore", 0.01)]
)
def test_a_published_preset_is_flow_grpo_with_twice_the_candidates(name: str, beta: float) -> None:
    settings = resolve(name, {})
    model, rollout, learner, selection = (
        settings.model, settings.rollout, settings.learner, settings.selection,
    )  # fmt: skip
    assert (model.path, model.dtype) == ("stabilityai/stable-diffusion-3.5-medium", "bfloat16")
    assert (model.lora_rank, model.lora_alpha) == (32, 64)
    assert (rollout.width, rollout.height, rollout.steps, rollout.eval_steps) == (512, 512, 10, 40)
    assert (rollout.guidance, rollout.text_tokens, rollout.noise_level) == (4.5, 128, 0.7)
    assert (rollout.dynamics, rollout.trained_steps) == ("sde", 9)
    assert (settings.groups_per_step, selection.candidates, selection.keep) == (48, 48, 24)
    assert (selection.strategy, selection.advantages) == ("noise_margin", "batch")
    assert (learner.learning_rate, learner.weight_decay, learner.betas) == (3e-4, 1e-4, (0.9, 0.999))
    objective: Any = learner.objective
    assert (objective.name, objective.beta, objective.kl) == ("flow_grpo", beta, "flow_grpo")
    assert (objective.clip, objective.advantage_clip, learner.updates) == (1e-4, 5, 2)
    assert (learner.ema_decay, learner.ema_every, learner.micro_batch) == (0.9, 8, 16)
    assert (settings.steps, settings.max_staleness) == (2000, 0)
    assert (settings.eval_every, settings.checkpoint_every, settings.image_every) == (60, 60, 60)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_preset_fits_a_node_of_eight_gpus(name: str) -> None:
    settings = resolve(name, {})
    gpus = settings.rollout.workers * settings.rollout.gpus + settings.learner.ranks * settings.learner.gpus
    gpus += sum(reward.workers * reward.gpus for reward in settings.rewards)
    assert gpus == 8


def step_gigabytes(settings: RunSettings) -> float:
    """Estimate the bytes of all candidates in flight: latents and images; SD3 has 16 channels at 1/8."""
    pixels = settings.rollout.width * settings.rollout.height
    latents = 2 * (settings.rollout.trained_steps + 1) * 16 * pixels / 64
    in_flight = (settings.max_staleness + 1) * settings.groups_per_step
    return in_flight * settings.selection.candidates * (latents + 3 * pixels) / 1e9


@pytest.mark.parametrize("name", BUNDLED + PUBLISHED)
def test_a_step_fits_into_the_object_store(name: str) -> None:
    settings = resolve(name, {})
    assert step_gigabytes(settings) < 0.5 * settings.cluster.object_store_gb


def test_a_published_preset_runs_small_with_another_model_and_no_gpus(set_free_memory: Any) -> None:
    set_free_memory(64)
    prompts = read_toml("words")["prompts"]
    overrides = {
        "model": {"path": "rollout/tiny/words"}, "rollout": SMALL, "learner": {"gpus": 0}, "prompts": prompts,
    }  # fmt: skip
    assert len(check(resolve("sd35-ocr", overrides)).held_out) == 32


def test_a_reward_that_is_not_there_is_refused(model_folder: Path, set_free_memory: Any) -> None:
    set_free_memory(64)
    overrides = {
        "model": {"path": str(model_folder)}, "prompts": read_toml("shapes")["prompts"],
        "rewards": [{"name": "nonesuch"}],
    }  # fmt: skip
    with pytest.raises(UserError, match=r"unknown reward 'nonesuch': expected one of .*ocr.*module:Class"):
        check(resolve("sd35-geneval", overrides))
