"""Trajectories: the window, the precision they are stored in, and that their log-probs are their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from rollout.families.registry import load_policy
from rollout.noise import candidate_noises, initial_latents
from rollout.sampler import Rollout, denoise, trained_window
from rollout.settings import ModelSettings, RolloutSettings

NOISES = candidate_noises(0, 0, 0, 3)
TEXT = "a photo of a red circle"
SHAPE = (8, 8, 8)


def settings(**changes: Any) -> RolloutSettings:
    values = {"width": 32, "height": 32, "steps": 5, "guidance": 1.0, "text_tokens": 0, "gpus": 0}
    return RolloutSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def policy(pipeline_folder: Path) -> Any:
    return load_policy(ModelSettings(path=str(pipeline_folder)), settings(), device="cpu", seed=0)


def sample(policy: Any, chosen: RolloutSettings, window: range, count: int = len(NOISES)) -> Rollout:
    conditioning = {name: value.expand(count, *value.shape) for name, value in policy.encode(TEXT).items()}
    schedule = policy.schedule(chosen.steps)
    return denoise(policy, chosen, conditioning, NOISES[:count], schedule, window)


@given(st.integers(2, 20), st.data(), st.integers(0, 2**31), st.integers(0, 10**6))
def test_a_window_lies_in_its_range_and_is_the_groups_own(
    steps: int, data: st.DataObject, seed: int, group_id: int
) -> None:
    start = data.draw(st.integers(0, steps - 2))
    stop = data.draw(st.integers(start + 1, steps - 1))
    size = data.draw(st.integers(1, stop - start))
    chosen = RolloutSettings(steps=steps, window_start=start, window_stop=stop, window_size=size)
    window = trained_window(chosen, seed, group_id)
    assert len(window) == size
    assert start <= window.start < window.stop <= stop
    assert window == trained_window(chosen, seed, group_id)


def test_windows_of_a_run_visit_every_place() -> None:
    chosen = RolloutSettings(steps=8, window_start=1, window_stop=6, window_size=2)
    starts = [trained_window(chosen, 0, group).start for group in range(400)]
    assert set(starts) == {1, 2, 3, 4}
    assert min(starts.count(start) for start in set(starts)) > 60
    assert starts != [trained_window(chosen, 1, group).start for group in range(400)]


@pytest.mark.parametrize(("dynamics", "density"), [("sde", None), ("cps", None), ("cps", "gaussian")])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_stored_states_have_the_recorded_log_probs(
    policy: Any, pipeline_folder: Path, dynamics: str, density: str | None, storage: str
) -> None:
    """Everything is computed again from the stored states: the velocity by diffusers, the rest in scalars."""
    chosen = settings(dynamics=dynamics, storage=storage, density=density)
    found = sample(policy, chosen, range(4))
    assert found.states.dtype == getattr(torch, storage)
    assert found.states.shape == (3, 5, *SHAPE)
    assert found.log_probs.shape == (3, 4)

    transformer = SD3Transformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    schedule, encoded = policy.schedule(5), policy.encode(TEXT)
    sigmas = schedule.sigmas.tolist()
    for step in range(4):
        x, x_next = found.states[:, step].float(), found.states[:, step + 1].float()
        with torch.no_grad():
            v = transformer(
                hidden_states=x,
                timestep=schedule.timesteps[step].expand(3),
                encoder_hidden_states=encoded["hidden"].expand(3, -1, -1),
                pooled_projections=encoded["pooled"].expand(3, -1),
            ).sample
        sigma, nxt = sigmas[step], sigmas[step + 1]
        if dynamics == "sde":
            s = 0.7 * math.sqrt(sigma / (1 - (nxt if step == 0 else sigma)))
            mean = x + (v + s * s / (2 * sigma) * (x + (1 - sigma) * v)) * (nxt - sigma)
            std = s * math.sqrt(sigma - nxt)
        else:
            std = nxt * math.sin(0.7 * math.pi / 2)
            mean = (1 - nxt) * (x - sigma * v) + math.sqrt(nxt**2 - std**2) * (x + (1 - sigma) * v)
        expected = Normal(mean, std).log_prob(x_next).flatten(1).mean(1)
        if dynamics == "cps" and density is None:
            expected = -((x_next - mean) ** 2).flatten(1).mean(1)
        assert torch.allclose(found.log_probs[:, step], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_the_sampler_continues_from_what_it_stored(policy: Any, storage: str) -> None:
    """The clean image follows by the ODE from the last stored state, not from a more precise one."""
    chosen = settings(storage=storage)
    found = sample(policy, chosen, range(1, 3))
    x, schedule = found.states[:, -1].float(), policy.schedule(5)
    conditioning = {name: value.expand(3, *value.shape) for name, value in policy.encode(TEXT).items()}
    for step in (3, 4):
        with torch.no_grad():
            v = policy.velocity(policy.transformer, x, schedule.timesteps[step].expand(3), conditioning)
        x = x + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * v
    assert torch.allclose(found.clean, x, atol=1e-5)


def test_before_its_window_a_trajectory_follows_the_ode(policy: Any) -> None:
    chosen = settings()
    found = sample(policy, chosen, range(2, 3))
    x, schedule = initial_latents(NOISES, SHAPE), policy.schedule(5)
    conditioning = {name: value.expand(3, *value.shape) for name, value in policy.encode(TEXT).items()}
    for step in (0, 1):
        with torch.no_grad():
            v = policy.velocity(policy.transformer, x, schedule.timesteps[step].expand(3), conditioning)
        x = x + (schedule.sigmas[step + 1] - schedule.sigmas[step]) * v
    assert found.states.shape[1] == 2
    assert torch.allclose(found.states[:, 0].float(), x, atol=2e-3)


def test_the_path_noise_is_spread_as_the_step_says(policy: Any) -> None:
    """At sigma = 1 the injected noise has std a exactly; the mean log-prob is then that of the normal."""
    found = sample(policy, settings(noise_level=0.5), range(1))
    expected = -0.5 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    assert found.log_probs.mean().item() == pytest.approx(expected, abs=0.05)


def test_without_a_window_nothing_is_stored(policy: Any) -> None:
    found = sample(policy, settings(), range(0))
    assert found.clean.shape == (3, *SHAPE)
    assert found.states.numel() == found.log_probs.numel() == 0


def test_a_candidate_does_not_depend_on_its_batch(policy: Any) -> None:
    together, alone = sample(policy, settings(), range(4)), sample(policy, settings(), range(4), count=1)
    assert torch.allclose(together.clean[:1], alone.clean, atol=2e-2)
    assert torch.allclose(together.log_probs[:1], alone.log_probs, atol=2e-2)
