"""Tests of the costs counted without memory, against the model itself where that can be measured."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rollout.families.published import PUBLISHED_SIZES
from rollout.families.registry import load_policy
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.model_costs import Sizes, cost_of, sizes_of
from rollout.tools.random_models import PUBLISHED, save_configs
from rollout.tools.real_models import REAL
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


@pytest.mark.parametrize("name", TINY)
def test_counts_are_those_of_the_real_model(name: str, tmp_path: Path) -> None:
    model = ModelSettings(path=str(TINY[name].save(tmp_path)), lora_rank=4)
    # Z-Image's model sees no padding, and a plan counts prompts as long as they can be, also the empty one.
    settings = TINY[name].settings(batch=4, **({"guidance": 1.0} if name == "z_image" else {}))
    found = sizes_of(model, settings, prompt=PROMPT, pairs=lambda tokens: 6, checkpointing=False)
    policy = load_policy(model, settings, device="cpu", seed=0)
    parameters = list(policy.transformer.parameters())
    assert found.parameters == sum(p.numel() for p in parameters)
    assert found.trained == sum(p.numel() for _, p in trainable(policy.transformer))
    prompt = " ".join(["a red circle"] * 99)  # as long as a prompt can be
    text = {key: value.expand(6, *value.shape) for key, value in policy.encode(prompt).items()}
    x, timestep = torch.randn(6, *policy.latent_shape()), torch.full((6,), 500.0)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        policy.velocity(policy.transformer, x, timestep, text)
    with FlopCounterMode(display=False) as both:
        policy.velocity(policy.transformer, x, timestep, text).sum().backward()
    assert found.reference.flops == pytest.approx(forward.get_total_flops(), rel=1e-9)
    assert found.sampling.flops == pytest.approx(forward.get_total_flops() * 4 / 6, rel=0.05)
    assert found.training.flops == pytest.approx(both.get_total_flops(), rel=1e-9)
    latents = torch.randn(4, *policy.latent_shape())
    with FlopCounterMode(display=False) as decoding:
        policy.decode(latents)
    assert found.decoding.flops == decoding.get_total_flops()


@pytest.mark.parametrize("name", TINY)
def test_the_shapes_of_a_prompt_are_known_without_its_encoders(name: str, tmp_path: Path) -> None:
    folder = TINY[name].save(tmp_path)
    policy = load_policy(ModelSettings(path=str(folder)), TINY[name].settings(), device="cpu", seed=0)
    assert policy.text_shapes(PROMPT) == {key: (*v.shape,) for key, v in policy.embed("a cat").items()}


@pytest.mark.parametrize("name", ["sd3-medium", "flux1-dev", "flux2-klein-4b", "z-image", "wan21-1.3b"])
def test_published_configurations_have_the_published_parameters(name: str, tmp_path: Path) -> None:
    save_configs(name, tmp_path)
    model = ModelSettings(path=str(tmp_path))
    policy = load_policy(model, RolloutSettings(), device="meta", seed=0, whole=False)
    (hub,) = (hub for hub, short in PUBLISHED.items() if short == name)
    count = sum(p.numel() for p in policy.transformer.parameters())
    assert count == pytest.approx(PUBLISHED_SIZES[hub].transformer, rel=0.02)


def test_a_convolution_copies_its_input_where_it_rearranges() -> None:
    with torch.device("meta"):
        layer, x = torch.nn.Conv2d(8, 2, 3), torch.empty(4, 8, 34, 34)

    def work() -> None:
        layer(x + 0)

    plain, copied = (cost_of(layer, work, rearranges=rearranges) for rearranges in (False, True))
    assert plain.live == 4 * (4 * 8 * 34 * 34 + 4 * 2 * 32 * 32)
    assert copied.live == plain.live + 4 * (4 * 8 * 34 * 34)
    assert copied.flops == plain.flops


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
    medium = REAL["sd35-medium"]
    shallow = partial(medium.transformer, num_layers=2, dual_attention_layers=(0,))
    monkeypatch.setitem(REAL, "sd35-medium", replace(medium, transformer=shallow))
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
