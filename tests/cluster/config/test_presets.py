"""The bundled presets: all resolve, and only their values differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from cluster.config.errors import UserError
from cluster.config.preflight import check
from cluster.config.settings import RunSettings
from cluster.config.sources import PRESETS, preset_names, read_toml, resolve
from cluster.plan.__main__ import main as plan
from learner.objectives.registry import load_objective
from rewards.registry import REWARDS
from rollout.prompts import load_prompts
from tests.support.paths import ROOT

BUNDLED = ("preference", "shapes", "words")
BEST = "shapes-nft"
"""What `make train` runs."""
SD35 = ("sd35-geneval", "sd35-ocr", "sd35-pickscore")
FAST = ("sd35-geneval-fast", "sd35-pickscore-fast")
NFT = ("sd35-geneval-nft", "sd35-ocr-nft", "sd35-pickscore-nft")
ALONE = {"sd35-ocr-24gb": 24, "sd35-pickscore-80gb": 80, "klein-ocr-24gb": 24}
"""Presets for one GPU, with its memory in GB."""
PUBLISHED = (*SD35, *FAST, *NFT, "flux-pickscore", "wan-ocr")
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
    assert preset_names() == sorted((*BUNDLED, BEST, *PUBLISHED, *ALONE))


@pytest.mark.parametrize("name", [*BUNDLED, BEST, *PUBLISHED, *ALONE])
def test_a_preset_resolves_and_says_what_it_is_for(name: str) -> None:
    assert resolve(name, {}).preset == name
    lines = (PRESETS / f"{name}.toml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 25


@pytest.mark.parametrize("name", [*BUNDLED, BEST, *PUBLISHED, *ALONE])
def test_only_values_differ_between_presets(name: str) -> None:
    found, expected = dumped(name), dumped("shapes")
    if found["learner"]["objective"]["name"] != "flow_grpo":  # each has its own keys
        for values in (found, expected):
            del values["learner"]["objective"]
    assert keys(found) == keys(expected)


@pytest.mark.parametrize("name", [*BUNDLED, BEST])
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


def test_what_make_train_runs_is_the_task_of_shapes_by_nft() -> None:
    task, best = resolve("shapes", {}), resolve(BEST, {})
    assert (best.prompts, best.rewards, best.selection) == (task.prompts, task.rewards, task.selection)
    assert best.rollout == task.rollout.model_copy(update={"dynamics": "ode"})
    assert best.model == task.model
    assert best.learner.objective.name == "nft"
    assert (best.learner.updates, best.learner.ema_every, best.steps) == (4, 1, 70)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"cluster.train {BEST}\n" in makefile


@pytest.mark.parametrize(
    ("name", "beta"), [("sd35-geneval", 0.04), ("sd35-ocr", 0.04), ("sd35-pickscore", 0.01)]
)
def test_a_published_preset_is_flow_grpo_with_twice_the_candidates(name: str, beta: float) -> None:
    settings = resolve(name, {})
    model, rollout, learner, selection = (
        settings.model, settings.rollout, settings.learner, settings.selection,
    )  # fmt: skip
    assert (model.path, model.dtype) == ("stabilityai/stable-diffusion-3.5-medium", "float16")
    assert (model.lora_rank, model.lora_alpha) == (32, 64)
    assert (rollout.width, rollout.height, rollout.steps, rollout.eval_steps) == (512, 512, 10, 40)
    assert (rollout.guidance, rollout.text_tokens, rollout.noise_level) == (4.5, None, 0.7)
    assert (rollout.dynamics, rollout.trained_steps) == ("sde", 9)
    assert (settings.groups_per_step, selection.candidates, selection.keep) == (48, 48, 24)
    assert (selection.strategy, selection.advantages) == ("noise_margin", "batch")
    assert (learner.learning_rate, learner.weight_decay, learner.betas) == (3e-4, 1e-4, (0.9, 0.999))
    objective: Any = learner.objective
    assert (objective.name, objective.beta, objective.kl) == ("flow_grpo", beta, "flow_grpo")
    assert (objective.clip, objective.advantage_clip, learner.updates) == (1e-4, 5, 2)
    assert (learner.ema_decay, learner.ema_every) == (0.81, 8)
    assert (settings.steps, settings.max_staleness) == (2000, 0)
    assert (settings.eval_every, settings.checkpoint_every, settings.image_every) == (60, 60, 60)


@pytest.mark.parametrize(
    ("name", "updates", "strength", "behaviour"),
    [
        ("sd35-geneval-nft", 1, 1.0, (0.5, 1e-3, 0)),
        ("sd35-pickscore-nft", 1, 1.0, (0.5, 1e-3, 0)),
        ("sd35-ocr-nft", 2, 0.1, (0.999, 7.5e-3, 75)),
    ],
)
def test_a_preset_of_nft_has_the_published_values(
    name: str, updates: int, strength: float, behaviour: tuple[float, float, int]
) -> None:
    settings = resolve(name, {})
    objective: Any = settings.learner.objective
    assert (objective.name, objective.strength, objective.reward_clip) == ("nft", strength, 5)
    # The published loss has the factor 5, by which it clips advantages.
    assert (objective.draws, 5 * objective.kl_weight) == (9, pytest.approx(1e-4))
    assert 5 * settings.learner.max_grad_norm == pytest.approx(1.0)
    assert (settings.learner.ema_decay, settings.learner.ema_every) == (0.9, 1)
    lag = (objective.behaviour_decay, objective.behaviour_ramp, objective.behaviour_hold)
    assert lag == behaviour
    assert (settings.learner.updates, settings.learner.learning_rate) == (updates, 3e-4)
    rollout, selection = settings.rollout, settings.selection
    assert (rollout.dynamics, rollout.solver, rollout.guidance) == ("ode", "dpm2", 1)
    assert (rollout.steps, rollout.eval_steps) == (10, 40)
    assert (settings.groups_per_step, selection.candidates, selection.keep) == (48, 48, 24)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_preset_fits_a_node_of_eight_gpus(name: str) -> None:
    settings = resolve(name, {})
    gpus = settings.rollout.workers * settings.rollout.gpus + settings.learner.ranks * settings.learner.gpus
    gpus += sum(reward.workers * reward.gpus for reward in settings.rewards)
    assert 7 < gpus < 8 + 1e-6


@pytest.mark.parametrize("name", PUBLISHED)
def test_in_a_published_preset_every_gpu_samples_and_trains_and_rounds_alike(name: str) -> None:
    settings = resolve(name, {})
    rollout, learner = settings.rollout, settings.learner
    assert (rollout.workers, learner.ranks, settings.max_staleness) == (8, 8, 0)
    assert learner.gpus > 0.5  # two ranks must not share a GPU
    recomputes = getattr(learner.objective, "old_log_probs", "learner") == "learner"
    assert recomputes or (learner.micro_batch == rollout.batch and not settings.model.compile)
    kept = settings.groups_per_step * settings.selection.keep
    share = kept // (learner.updates * learner.ranks) * load_objective(learner.objective).rows(rollout)
    assert (
        share % (learner.micro_batch or 0) == 0
    )  # no smaller pass at the end, which would round differently
    assert (settings.groups_per_step * settings.selection.candidates) % rollout.batch == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gb"), ALONE.items())
def test_a_preset_for_one_gpu_fits_it(name: str, gb: int, capsys: pytest.CaptureFixture[str]) -> None:
    settings = resolve(name, {})
    rollout, learner = settings.rollout, settings.learner
    share = settings.groups_per_step * settings.selection.keep // learner.updates * rollout.trained_steps
    assert share % (learner.micro_batch or 0) == 0
    assert cast(Any, learner.objective).old_log_probs == "learner"
    assert plan([name, "--gpus", "1", "--gpu-memory", f"{gb}GB"]) == 0
    assert "does not fit" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "groups", "candidates", "keep"),
    [("sd35-geneval-fast", 48, 48, 24), ("sd35-pickscore-fast", 64, 36, 18)],
)
def test_the_fast_presets_are_what_flow_grpo_recommends(
    name: str, groups: int, candidates: int, keep: int
) -> None:
    settings = resolve(name, {})
    rollout, objective = settings.rollout, cast(Any, settings.learner.objective)
    assert (settings.groups_per_step, settings.selection.candidates, settings.selection.keep) == (
        groups, candidates, keep,
    )  # fmt: skip
    assert (rollout.dynamics, rollout.noise_level, rollout.guidance, rollout.log_density) == (
        "cps", 0.8, 1.0, "unscaled",
    )  # fmt: skip
    assert (rollout.window_range, rollout.trained_steps, rollout.steps) == ((0, 5), 3, 10)
    assert (objective.clip, objective.beta, settings.selection.advantages) == (1e-5, 0, "batch")
    # Passes of the model, of which a backward pass counts as two: sampling, and the three trained steps.
    assert rollout.steps + rollout.trained_steps * 2 == 16


def test_flux_and_wan_have_their_published_settings() -> None:
    flux, wan = resolve("flux-pickscore", {}), resolve("wan-ocr", {})
    found: Any = flux.learner.objective
    assert (flux.rollout.steps, flux.rollout.eval_steps, flux.rollout.guidance) == (6, 28, 3.5)
    assert (flux.rollout.noise_level, flux.model.dtype, found.beta, found.clip) == (0.9, "bfloat16", 0, 1e-4)
    assert (wan.rollout.width, wan.rollout.height, wan.rollout.frames) == (416, 240, 33)
    assert (wan.rollout.steps, wan.rollout.eval_steps, wan.rollout.guidance) == (20, 50, 4.5)
    found = wan.learner.objective
    assert (found.clip, found.beta, wan.learner.learning_rate) == (1e-3, 0.004, 1e-4)
    assert (wan.selection.keep, wan.selection.advantages, wan.model.dtype) == (4, "selected", "bfloat16")
    for one in (flux, wan):
        assert cast(Any, one.learner.objective).old_log_probs == "learner"


def step_gigabytes(settings: RunSettings) -> float:
    """Estimate the bytes of all candidates in flight: latents and images; SD3 has 16 channels at 1/8."""
    pixels = settings.rollout.width * settings.rollout.height
    latents = 2 * (settings.rollout.trained_steps + 1) * 16 * pixels / 64
    in_flight = (settings.max_staleness + 1) * settings.groups_per_step
    return in_flight * settings.selection.candidates * (latents + 3 * pixels) / 1e9


@pytest.mark.parametrize("name", [*BUNDLED, *PUBLISHED, *ALONE])
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
