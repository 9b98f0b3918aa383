"""How the gradient of the log-probability is divided among a trajectory's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rollout.families.registry import Schedule, load_policy
from rollout.sampler import stochastic, trained_window
from rollout.sde import log_prob
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.tiny_families import TINY

GROUPS = 600
SHIFTS = (1.0, 3.0, 5.0, 12.0)
"""Of schedules from unshifted to more shifted than any family's at its usual sizes."""


def shares(schedule: Schedule, settings: RolloutSettings) -> list[float]:
    """The shares of the squared gradient in the velocities, by step, over the windows of many groups."""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(settings.steps)
    for group in range(GROUPS):
        for step in trained_window(settings, seed=0, group_id=group):
            x, noise = torch.randn(2, 1, 64, generator=generator)
            v = torch.zeros(1, 64, requires_grad=True)
            sigmas = schedule.sigmas[step].view(1), schedule.sigmas[step + 1].view(1)
            move = stochastic(settings, x, v, sigmas)
            log_prob((move.mean + move.std * noise).detach(), move).sum().backward()
            assert v.grad is not None
            found[step] += v.grad.square().sum()
    return (found / found.sum()).tolist()


def shifted(shift: float, steps: int) -> Schedule:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return Schedule(scheduler.sigmas, scheduler.timesteps)


@pytest.mark.parametrize("level", [0.7, 0.8])
@pytest.mark.parametrize("shift", SHIFTS)
def test_by_default_no_step_of_cps_takes_nearly_all(shift: float, level: float) -> None:
    settings = RolloutSettings(dynamics="cps", noise_level=level)
    assert max(shares(shifted(shift, settings.steps), settings)) < 0.4


@pytest.mark.parametrize("name", list(TINY))
def test_nor_on_any_familys_own_schedule(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    defaults: Any = tiny.settings(dynamics="cps", steps=RolloutSettings().steps, noise_level=0.8)
    model = ModelSettings(path=str(tiny.save(tmp_path)))
    policy = load_policy(model, defaults, device="cpu", seed=0, whole=False)
    assert max(shares(policy.schedule(defaults.steps), defaults)) < 0.4


def test_as_gaussians_the_last_trained_step_takes_it_all() -> None:
    """What the defaults avoid, and why they are not the SDE's."""
    settings = RolloutSettings(dynamics="cps", density="gaussian", window_stop=9)
    assert shares(shifted(3.0, 10), settings)[8] > 0.99
