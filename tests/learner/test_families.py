"""Every family in the learner: it computes what the sampler computed, and its update changes the image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rollout.records import WeightsId
from rollout.settings import ModelSettings
from rollout.tools.tiny_families import TINY, Tiny
from tests.support.tiny_learner import hand_over, learner_settings, sample, sampler, start, update

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module", params=list(TINY))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    tiny = TINY[request.param]
    return tiny, tiny.save(tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("dynamics", ["sde", "cps"])
def test_on_policy_the_ratio_is_one(checkpoint: tuple[Tiny, Path], dynamics: str) -> None:
    tiny, folder = checkpoint
    model, rollout = ModelSettings(path=str(folder), lora_rank=4), tiny.settings(dynamics=dynamics)
    worker = start(model, rollout, learner_settings(updates=1, beta=0.01))
    metrics = update(worker, *sample(model, rollout).calls(updates=1)[0])
    assert metrics["ratio_max_deviation"] <= 1e-5
    assert metrics["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["grad_norm"] > 0


def test_an_update_reaches_the_sampler(checkpoint: tuple[Tiny, Path]) -> None:
    tiny, folder = checkpoint
    model, rollout = ModelSettings(path=str(folder)), tiny.settings(window_start=1, window_size=1)
    before = sample(model, rollout)
    worker = start(model, rollout, learner_settings(updates=1, gradient_checkpointing=True))
    metrics = update(worker, *before.calls(updates=1)[0])
    assert metrics["ratio_max_deviation"] <= 1e-5
    receiver = sampler(model, rollout)
    x = torch.randn(1, *receiver.policy.latent_shape())
    text = {name: value[None] for name, value in receiver.policy.encode("a cat").items()}
    schedule = receiver.policy.schedule(rollout.steps)

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            return receiver.policy.velocity(receiver.policy.transformer, x, schedule.timesteps[1][None], text)

    old = velocity()
    assert hand_over(worker, receiver, version=1) == WeightsId(1)
    assert (velocity() - old).abs().max() > 1e-5
