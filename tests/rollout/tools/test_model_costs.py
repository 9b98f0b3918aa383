"""Tests of the costs counted without memory, against the model itself where that can be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rollout.families.registry import load_policy
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.model_costs import Sizes, sizes_of
from rollout.tools.random_models import TRANSFORMERS, save_configs
from rollout.tools.tiny_families import TINY
from rollout.weights import trainable

PROMPT = 14


def rollout(**changes: Any) -> RolloutSettings:
    values = {"width": 32, "height": 32, "guidance": 3.0, "text_tokens": 0, "gpus": 0, "batch": 4}
    return RolloutSettings(**{**values, **changes})


def count(folder: Path, *, pairs: int = 6, checkpointing: bool = False, **changes: Any) -> Sizes:
    model = ModelSettings(path=str(folder), lora_rank=4)
    return sizes_of(
        model, rollout(**changes), prompt=PROMPT, pairs=lambda tokens: pairs, checkpointing=checkpointing
    )


def test_counts_are_those_of_the_real_model(pipeline_folder: Path) -> None:
    found = count(pipeline_folder)
    policy = load_policy(
        ModelSettings(path=str(pipeline_folder), lora_rank=4), rollout(), device="cpu", seed=0
    )
    parameters = list(policy.transformer.parameters())
    assert found.parameters == sum(p.numel() for p in parameters)
    assert found.trained == sum(p.numel() for _, p in trainable(policy.transformer))
    text = {name: value.expand(6, *value.shape) for name, value in policy.encode("a red circle").items()}
    x, timestep = torch.randn(6, *policy.latent_shape()), torch.full((6,), 500.0)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        policy.velocity(policy.transformer, x, timestep, text)
    with FlopCounterMode(display=False) as both:
        policy.velocity(policy.transformer, x, timestep, text).sum().backward()
    assert found.reference.flops == forward.get_total_flops()
    assert found.sampling.flops == pytest.approx(forward.get_total_flops() * 4 / 6, rel=0.05)
    assert found.training.flops == both.get_total_flops()
    latents = torch.randn(4, *policy.latent_shape())
    with FlopCounterMode(display=False) as decoding:
        policy.decode(latents)
    assert found.decoding.flops == decoding.get_total_flops()


@pytest.mark.slow
def test_memory_grows_with_what_is_held(pipeline_folder: Path) -> None:
    one, two = count(pipeline_folder, pairs=6), count(pipeline_folder, pairs=12)
    assert two.training.live == pytest.approx(2 * one.training.live, rel=0.1)
    assert one.training.live > 2 * one.reference.live
    assert count(pipeline_folder, checkpointing=True).training.live < 0.7 * one.training.live
    sliced = count(pipeline_folder, decode="sliced")
    assert sliced.decoding.live == pytest.approx(one.decoding.live / 4, rel=0.1)
    assert sliced.decoding.flops == one.decoding.flops


def test_a_published_model_is_counted_from_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = {**TRANSFORMERS["sd35-medium"], "num_layers": 2, "dual_attention_layers": (0,)}
    monkeypatch.setitem(TRANSFORMERS, "sd35-medium", shallow)
    save_configs("sd35-medium", tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    found = sizes_of(
        ModelSettings(path=str(tmp_path), dtype="bfloat16"),
        RolloutSettings(text_tokens=128),
        prompt=77,
        pairs=lambda tokens: tokens // 128,
        checkpointing=False,
    )
    assert found.pairs == 8  # 1024 tokens at 512 px
    positions = 384 * 384 * 1536  # a buffer
    assert found.weights == pytest.approx(4 * (found.parameters + positions), rel=0.01)  # all is trained


def test_another_family_is_refused(tmp_path: Path) -> None:
    folder = TINY["sana"].save(tmp_path)
    with pytest.raises(ValueError, match=r"only SD3 and SD3\.5 can be counted, not a SanaPipeline"):
        count(folder, width=64)
