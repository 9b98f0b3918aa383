"""In half precision every family's parameters have the precision that diffusers and training want."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rollout.families.registry import load_policy
from rollout.families.transformer import stays_float32
from rollout.settings import ModelSettings
from rollout.tools.export import write_pipeline
from rollout.tools.tiny_families import TINY, Tiny


@pytest.fixture(scope="module", params=list(TINY))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    tiny = TINY[request.param]
    return tiny, tiny.save(tmp_path_factory.mktemp(request.param))


def load(saved: tuple[Tiny, Path], **model: Any) -> Any:
    tiny, folder = saved
    return load_policy(ModelSettings(path=str(folder), **model), tiny.settings(), device="cpu", seed=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_diffusers_keeps_in_float32_and_what_is_trained_stay_so(
    saved: tuple[Tiny, Path], dtype: str
) -> None:
    exact = dict(load(saved).transformer.named_parameters())
    policy = load(saved, dtype=dtype, lora_rank=2)
    kept = 0
    for name, parameter in policy.transformer.named_parameters():
        alone = stays_float32(policy.transformer, name)
        float32 = parameter.requires_grad or alone
        assert parameter.dtype == (torch.float32 if float32 else getattr(torch, dtype)), name
        if alone and "lora" not in name:
            kept += 1
            assert torch.equal(parameter, exact[name.replace(".base_layer", "")])
    assert kept == (8 if policy.index["_class_name"] == "WanPipeline" else 0)


def test_the_autoencoder_has_the_values_of_its_file(saved: tuple[Tiny, Path]) -> None:
    policy, exact = load(saved, dtype="bfloat16", lora_rank=2), load(saved)
    for ours, whole in zip(policy.pipeline.vae.parameters(), exact.pipeline.vae.parameters(), strict=True):
        assert torch.equal(ours, whole)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_velocity_is_nearly_that_of_float32_and_has_a_gradient(
    saved: tuple[Tiny, Path], dtype: str, lora_rank: int
) -> None:
    exact, policy = load(saved, lora_rank=lora_rank), load(saved, dtype=dtype, lora_rank=lora_rank)
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([900.0, 300.0])
    found = []
    for one in (exact, policy):
        text = {name: value.expand(2, *value.shape) for name, value in one.encode("a red circle").items()}
        found.append(one.velocity(one.transformer, x, timestep, text))
        (2**8 * found[-1].square().mean()).backward()
    whole, half = (v.detach() for v in found)
    assert half.dtype == torch.float32
    assert 0 < (half - whole).norm() < 0.1 * whole.norm()
    gradients = [
        torch.cat([p.grad.flatten() for p in one.transformer.parameters() if p.grad is not None])
        for one in (exact, policy)
    ]
    assert gradients[1].dtype == torch.float32
    # These random networks amplify rounding far more than trained ones.
    assert torch.cosine_similarity(*gradients, dim=0) > (0.97 if dtype == "float16" else 0.75)


def test_an_exported_pipeline_keeps_them_as_well(saved: tuple[Tiny, Path], tmp_path: Path) -> None:
    tiny, folder = saved
    model = ModelSettings(path=str(folder), dtype="bfloat16")
    exact = load(saved).transformer
    save_file({name: p.detach() for name, p in exact.named_parameters()}, tmp_path / "weights.safetensors")
    write_pipeline(tmp_path / "weights.safetensors", model, tiny.settings(), tmp_path / "out")
    again = load((tiny, tmp_path / "out"), dtype="bfloat16", lora_rank=2)
    kept = dict(exact.named_parameters())
    for name, parameter in again.transformer.named_parameters():
        if "lora" not in name and stays_float32(again.transformer, name):
            assert torch.equal(parameter, kept[name.replace(".base_layer", "")])
