"""Pretraining in miniature: it runs, it is reproducible, and it writes a pipeline that the rollout loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout.families.registry import load_policy
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tiny import pretrain
from rollout.tiny.build import WORLDS, build_pipeline
from rollout.tiny.pretrain import CORRUPTION, Recipe, bank, descend, encode_ids, to_pixels
from rollout.tiny.world import draw_word

MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def recipe(task: str = "shapes", seed: int = 0, images: int = 24) -> Recipe:
    return Recipe(
        task=task, seed=seed, images=images, vae_steps=2, true_steps=2, false_steps=1, batch=6, vae_batch=6
    )


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value
        for part in MODELS
        for name, value in getattr(pipeline, part).state_dict().items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("task", sorted(WORLDS))
def test_the_bank_is_the_seeds_own(task: str) -> None:
    captions, images = bank(recipe(task), 0.5, seed=4)
    width, height = WORLDS[task].size
    assert images.shape == (24, height, width, 3)
    again, same_images = bank(recipe(task), 0.5, seed=4)
    assert captions == again
    assert np.array_equal(images, same_images)
    assert captions != bank(recipe(task), 0.5, seed=5)[0]


@pytest.mark.parametrize("chance", [0.0, CORRUPTION["words"], 1.0])
def test_captions_are_wrong_as_often_as_told(chance: float) -> None:
    captions, images = bank(recipe("words", images=400), chance, seed=0)
    right = [
        np.array_equal(image, draw_word(caption.split('"')[1]))
        for caption, image in zip(captions, images, strict=True)
    ]
    assert np.mean(right) == pytest.approx((1 - chance) ** 3, abs=0.07 if 0 < chance < 1 else 0)


def test_pixels_span_minus_one_to_one() -> None:
    images = np.zeros((2, 4, 6, 3), dtype=np.uint8)
    images[1, 2, 3, 1] = 255
    pixels = to_pixels(images)
    assert pixels.shape == (2, 3, 4, 6)
    assert pixels[1, 1, 2, 3] == 1
    assert pixels.sum() == 2 - pixels.numel()


def test_descend_finds_a_minimum() -> None:
    point = torch.nn.Parameter(torch.zeros(3))
    goal = torch.tensor([0.5, -0.25, 0.1])
    descend([point], 0.05, 300, lambda: torch.nn.functional.mse_loss(point, goal), "test")
    assert torch.allclose(point, goal, atol=2e-2)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(pipeline_folder: Path) -> None:
    rollout = RolloutSettings(width=32, height=32, guidance=1.0, text_tokens=0, gpus=0)
    policy = load_policy(ModelSettings(path=str(pipeline_folder)), rollout, device="cpu", seed=0)
    text = "a photo of a red circle"
    ids = policy.pipeline.tokenizer(
        [text], padding="max_length", max_length=policy.pipeline.tokenizer_max_length, return_tensors="pt"
    ).input_ids
    hidden, pooled = encode_ids(policy.pipeline, ids)
    found = policy.encode(text)
    width = hidden.shape[-1]
    assert torch.allclose(found["hidden"][: hidden.shape[1], :width], hidden[0], atol=1e-6)
    assert torch.allclose(found["pooled"], pooled[0], atol=1e-6)


def test_the_same_recipe_gives_the_same_weights() -> None:
    first = pretrain.pretrain(recipe())
    assert same(weights(first), weights(pretrain.pretrain(recipe())))
    assert not same(weights(first), weights(pretrain.pretrain(recipe(seed=1))))
    start = weights(build_pipeline("shapes", 0))
    for part in MODELS:
        moved = [not torch.equal(v, start[k]) for k, v in weights(first).items() if k.startswith(part)]
        assert np.mean(moved) > 0.5
    _, images = bank(recipe(), CORRUPTION["shapes"], seed=0)
    with torch.no_grad():
        latents = first.vae.encode(to_pixels(images)).latent_dist.mean
    normal = (latents - first.vae.config.shift_factor) * first.vae.config.scaling_factor
    assert normal.mean().abs() < 1e-3
    assert normal.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("task", sorted(WORLDS))
def test_the_command_writes_a_pipeline_that_loads(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / task
    command = f"pretrain {task} --images 16 --vae-steps 1 --true-steps 1 --false-steps 1 --out {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    pretrain.main()
    width, height = WORLDS[task].size
    rollout = RolloutSettings(width=width, height=height, guidance=1.0, text_tokens=0, gpus=0)
    policy = load_policy(ModelSettings(path=str(out)), rollout, device="cpu", seed=0)
    assert next(policy.transformer.parameters()).dtype == torch.float32
    assert policy.latent_shape() == (8, height // 4, width // 4)
    images, _ = policy.decode(torch.zeros(1, *policy.latent_shape()))
    assert images.shape == (1, height, width, 3)
    assert sum(path.stat().st_size for path in out.rglob("*")) < 8 * 2**20
