"""The SD3 adapter against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from rollout.families.registry import load_policy
from rollout.noise import candidate_noises, held_out_latents, initial_latents
from rollout.records import Prompt
from rollout.sampler import denoise
from rollout.settings import ModelSettings, RolloutSettings
from rollout.worker import RolloutWorker

TEXTS = ("a photo of a red circle", "a photo of two crosses", "a photo of a square above a circle")
NOISES = candidate_noises(0, 0, 0, len(TEXTS))
SHAPE = (8, 8, 8)
CASES = [pytest.param(1.0, 0, id="unguided"), pytest.param(4.5, 8, id="guided")]


def settings(guidance: float = 1.0, text_tokens: int = 0, **changes: Any) -> RolloutSettings:
    return RolloutSettings(
        width=32, height=32, steps=4, eval_steps=5, guidance=guidance, text_tokens=text_tokens, gpus=0,
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def original(pipeline_folder: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        pipeline_folder, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_original(
    pipeline: StableDiffusion3Pipeline, chosen: RolloutSettings, output: str, latents: torch.Tensor
) -> Any:
    return pipeline(
        list(TEXTS),
        latents=latents,
        num_inference_steps=chosen.eval_steps,
        guidance_scale=chosen.guidance,
        max_sequence_length=chosen.text_tokens,
        width=chosen.width,
        height=chosen.height,
        output_type=output,
    ).images


@pytest.mark.parametrize(("guidance", "text_tokens"), CASES)
def test_ode_latents_are_those_of_diffusers(
    pipeline_folder: Path, original: StableDiffusion3Pipeline, guidance: float, text_tokens: int
) -> None:
    chosen = settings(guidance, text_tokens)
    policy = load_policy(ModelSettings(path=str(pipeline_folder)), chosen, device="cpu", seed=0)
    assert policy.latent_shape() == SHAPE
    encoded = [policy.encode(text) for text in TEXTS]
    conditioning = {name: torch.stack([one[name] for one in encoded]) for name in encoded[0]}
    schedule = policy.schedule(chosen.eval_steps)
    found = denoise(policy, chosen, conditioning, NOISES, schedule, range(0)).clean
    expected = run_original(original, chosen, "latent", initial_latents(NOISES, SHAPE))
    assert (found - expected).abs().max() < 1e-4
    assert (expected - initial_latents(NOISES, SHAPE)).abs().max() > 0.1  # the model did move them


@pytest.mark.parametrize(("guidance", "text_tokens"), CASES)
def test_evaluation_images_are_those_of_diffusers(
    pipeline_folder: Path, original: StableDiffusion3Pipeline, guidance: float, text_tokens: int
) -> None:
    chosen = settings(guidance, text_tokens, batch=2)
    worker = RolloutWorker(ModelSettings(path=str(pipeline_folder)), chosen, seed=0)
    prompts = [Prompt(index=i, text=text) for i, text in enumerate(TEXTS)]
    finite, images = worker.evaluate(prompts, NOISES)
    drawn = run_original(original, chosen, "pil", held_out_latents(NOISES, SHAPE))
    expected = np.stack([np.asarray(image) for image in drawn])
    assert finite == (True,) * len(TEXTS)
    assert images.dtype == np.uint8
    assert images.shape == expected.shape
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1
    assert (images != expected).mean() < 0.01  # rounded, as diffusers does, and not cut
    assert expected.std() > 3


def test_guidance_extrapolates_from_the_empty_prompt(pipeline_folder: Path) -> None:
    policy = load_policy(ModelSettings(path=str(pipeline_folder)), settings(4.0), device="cpu", seed=0)
    found = {name: value[None] for name, value in policy.encode(TEXTS[0]).items()}
    negative = {name: value[None] for name, value in policy.encode("").items()}
    assert torch.equal(found["negative_hidden"], negative["hidden"])
    assert torch.equal(found["negative_pooled"], negative["pooled"])

    x, timestep = initial_latents(NOISES[:1], SHAPE), torch.tensor([600.0])
    with torch.no_grad():
        guided = policy.velocity(policy.transformer, x, timestep, found)
        policy.rollout = settings(1.0)
        alone = policy.velocity(policy.transformer, x, timestep, found)
        empty = policy.velocity(policy.transformer, x, timestep, negative)
    assert torch.allclose(guided, empty + 4 * (alone - empty), atol=1e-5)
    assert (alone - empty).abs().max() > 1e-4


def test_without_guidance_nothing_negative_travels(pipeline_folder: Path) -> None:
    policy = load_policy(ModelSettings(path=str(pipeline_folder)), settings(1.0), device="cpu", seed=0)
    assert set(policy.encode(TEXTS[0])) == {"hidden", "pooled"}


def test_the_schedule_is_the_schedulers_own(
    pipeline_folder: Path, original: StableDiffusion3Pipeline
) -> None:
    model = ModelSettings(path=str(pipeline_folder))
    policy = load_policy(model, settings(), device="cpu", seed=0, whole=False)
    schedule = policy.schedule(6)
    original.scheduler.set_timesteps(6)
    assert torch.equal(schedule.sigmas, original.scheduler.sigmas)
    assert torch.equal(schedule.timesteps, original.scheduler.timesteps)
    assert schedule.sigmas[0] == 1
    assert schedule.sigmas[-1] == 0
    assert (schedule.sigmas.diff() < 0).all()


def test_only_the_transformer_is_loaded_for_the_learner(pipeline_folder: Path) -> None:
    model = ModelSettings(path=str(pipeline_folder))
    policy = load_policy(model, settings(), device="cpu", seed=0, whole=False)
    whole = load_policy(model, settings(), device="cpu", seed=0)
    assert not hasattr(policy, "pipeline")
    for (name, part), (other, full) in zip(
        policy.transformer.named_parameters(), whole.transformer.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(part, full)


def test_images_need_not_be_square(pipeline_folder: Path) -> None:
    chosen = settings().model_copy(update={"width": 24, "height": 16})
    worker = RolloutWorker(ModelSettings(path=str(pipeline_folder)), chosen, seed=0)
    assert worker.evaluate([Prompt(index=0, text=TEXTS[0])], NOISES[:1])[1].shape == (1, 16, 24, 3)
