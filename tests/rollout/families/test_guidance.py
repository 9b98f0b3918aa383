"""Tests of guidance: equal velocities with and without a gradient, which only the prompt's branch has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rollout.families.registry import load_policy
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.tiny_families import TINY


@pytest.mark.parametrize("family", ["sd3", "qwen_image", "sana"])
def test_the_branch_without_the_prompt_is_a_constant(family: str, tmp_path: Path) -> None:
    tiny = TINY[family]
    rollout: RolloutSettings = tiny.settings()
    model = ModelSettings(path=str(tiny.save(tmp_path)), lora_rank=4)
    policy = load_policy(model, rollout, device="cpu", seed=0)
    x = torch.randn(3, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([900.0, 500.0, 100.0])
    text = {name: value.expand(3, *value.shape) for name, value in policy.encode("a red circle").items()}
    recorded: list[bool] = []
    policy.transformer.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))

    with torch.no_grad():
        sampled = policy.velocity(policy.transformer, x, timestep, text)
    assert recorded == [False, False]
    recorded.clear()
    trained = policy.velocity(policy.transformer, x, timestep, text)
    assert recorded == [False, True]
    assert torch.equal(sampled, trained)  # the same passes, so the same rounding

    parameters = [p for p in policy.transformer.parameters() if p.requires_grad]
    direction = torch.randn(trained.shape, generator=torch.Generator().manual_seed(1))

    def gradients(v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = (v * direction).sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

    found = gradients(trained)
    empty = {name: text[f"negative_{name}"] for name in text if not name.startswith("negative_")}
    with_prompt = {name: text[name] for name in empty}
    constant = policy.predict(policy.transformer, x, timestep, empty).detach()
    varying = policy.predict(policy.transformer, x, timestep, with_prompt)
    expected = gradients(policy.combine(constant, varying))
    assert any(g.abs().max() > 0 for g in found)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
