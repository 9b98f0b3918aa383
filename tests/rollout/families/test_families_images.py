"""Tests of every family, old or new, against diffusers' own pipeline: see rollout/README.md."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from rollout.families.registry import FAMILIES, load_policy
from rollout.noise import candidate_noises
from rollout.records import Prompt
from rollout.sampler import denoise
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.export import call_arguments, write_lora
from rollout.tools.tiny_families import TINY, Tiny
from rollout.worker import RolloutWorker
from tests.support.start_noise import starts_from

TEXTS = ("a red circle", "two blue crosses above a green square")
NOISES = candidate_noises(0, 0, 0, len(TEXTS))


@dataclass(frozen=True)
class Case:
    """A checkpoint on disk, its settings, and the pipeline as plain diffusers loads it."""

    tiny: Tiny
    folder: Path
    pipeline: Any

    def call(self, rollout: RolloutSettings, *, held_out: bool = False) -> Tensor:
        """Draw with diffusers, (N, 3, H, W) in [0, 1]; of a video the middle frame."""
        generators = [torch.Generator().manual_seed(noise.initial) for noise in NOISES]
        arguments = call_arguments(str(self.folder), rollout)
        if "negative_prompt" in arguments:
            arguments = {**arguments, "negative_prompt": [arguments["negative_prompt"]] * len(TEXTS)}
        with nullcontext() if held_out else starts_from(self.pipeline, NOISES):
            found = self.pipeline(
                prompt=list(TEXTS), generator=generators, output_type="pt", **arguments
            )[0]  # fmt: skip
        return found if found.ndim == 4 else found[:, (rollout.frames - 1) // 2]


@pytest.fixture(scope="module", params=list(TINY))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny = TINY[request.param]
    folder = tiny.save(tmp_path_factory.mktemp(request.param))
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return Case(tiny, folder, pipeline)


def draw(policy: Any, rollout: RolloutSettings) -> Tensor:
    """Draw with our sampler by the ODE, as floats."""
    encoded = [policy.encode(text) for text in TEXTS]
    conditioning = {name: torch.stack([one[name] for one in encoded]) for name in encoded[0]}
    schedule = policy.schedule(rollout.eval_steps)
    clean = denoise(policy, rollout, conditioning, NOISES, schedule, range(0)).clean
    with torch.no_grad():
        return (policy.pixels(clean) / 2 + 0.5).clamp(0, 1)


def test_every_family_has_a_tiny_checkpoint() -> None:
    assert {type(tiny.build()).__name__ for tiny in TINY.values()} == set(FAMILIES)


def test_images_are_those_of_diffusers(case: Case) -> None:
    rollout = case.tiny.settings()
    policy = load_policy(ModelSettings(path=str(case.folder)), rollout, device="cpu", seed=0)
    found = draw(policy, rollout)
    expected = case.call(rollout)
    assert found.shape == expected.shape == (len(TEXTS), 3, rollout.height, rollout.width)
    assert (found - expected).abs().max() < 1e-4
    assert expected.std() > 0.01

    # The images depend on the guidance, as they could not if both sides ignored it.
    weaker = case.tiny.settings(guidance=1.5)
    assert (case.call(weaker) - expected).abs().max() > 1e-3


def test_the_worker_rounds_the_same_images(case: Case) -> None:
    rollout = case.tiny.settings(guidance=1.0, batch=1)
    worker = RolloutWorker(ModelSettings(path=str(case.folder)), rollout, seed=0)
    prompts = [Prompt(index=i, text=text) for i, text in enumerate(TEXTS)]
    _, images = worker.evaluate(prompts, NOISES)
    expected = case.call(rollout, held_out=True).permute(0, 2, 3, 1) * 255
    assert images.shape == expected.shape
    assert (torch.from_numpy(images) - expected).abs().max() <= 0.5 + 255e-4


def test_prompts_of_any_length_can_be_stacked(case: Case) -> None:
    rollout = case.tiny.settings()
    policy = load_policy(ModelSettings(path=str(case.folder)), rollout, device="cpu", seed=0)
    short, long = (policy.encode(text) for text in TEXTS)
    assert {name: value.shape for name, value in short.items()} == {
        name: value.shape for name, value in long.items()
    }
    assert not torch.equal(short["hidden"], long["hidden"])
    alone = {name for name in short if not name.startswith("negative_")}
    negative = {name.removeprefix("negative_") for name in short if name.startswith("negative_")}
    assert negative == (alone if policy.guided else set())
    policy.rollout = case.tiny.settings(guidance=1.0)
    assert set(policy.encode(TEXTS[0])) == alone


def test_the_learner_needs_only_the_transformer(case: Case) -> None:
    rollout, model = case.tiny.settings(), ModelSettings(path=str(case.folder))
    policy = load_policy(model, rollout, device="cpu", seed=0, whole=False)
    whole = load_policy(model, rollout, device="cpu", seed=0)
    assert not hasattr(policy, "pipeline")
    assert policy.latent_shape() == whole.latent_shape()
    for steps in (4, 7):
        sigmas = policy.schedule(steps).sigmas
        assert torch.equal(sigmas, whole.schedule(steps).sigmas)
        assert len(sigmas) == steps + 1
        assert (sigmas[0], sigmas[-1]) == (1, 0)
        assert (sigmas.diff() < 0).all()


def test_an_exported_adapter_draws_the_trained_image(case: Case, tmp_path: Path) -> None:
    rollout = case.tiny.settings()
    model = ModelSettings(path=str(case.folder), lora_rank=4, lora_alpha=10)
    worker = RolloutWorker(model, rollout, seed=0)
    with torch.no_grad():
        for _, parameter in worker.parameters:
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2
            )
    save_file({name: p.detach().float() for name, p in worker.parameters}, tmp_path / "weights.safetensors")
    write_lora(tmp_path / "weights.safetensors", model, rollout, tmp_path / "lora")

    base = case.call(rollout)
    case.pipeline.load_lora_weights(tmp_path / "lora")
    try:
        exported = case.call(rollout)
    finally:
        case.pipeline.unload_lora_weights()
    assert (draw(worker.policy, rollout) - exported).abs().max() < 1e-4
    assert (exported - base).abs().max() > 1e-2


def test_a_size_that_does_not_fit_is_refused(case: Case) -> None:
    rollout = case.tiny.settings(width=25)
    with pytest.raises(ValueError, match=r"rollout.width and rollout.height: got 25 x \d+, expected"):
        load_policy(ModelSettings(path=str(case.folder)), rollout, device="cpu", seed=0, whole=False)


def test_adapters_are_on_attention_alone(case: Case) -> None:
    model = ModelSettings(path=str(case.folder), lora_rank=2)
    policy = load_policy(model, case.tiny.settings(), device="cpu", seed=0, whole=False)
    adapted = {name for name, p in policy.transformer.named_parameters() if p.requires_grad}
    assert adapted
    assert all("lora_" in name and ("attn" in name or "attention" in name) for name in adapted)
