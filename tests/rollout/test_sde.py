"""The step's maths against scalar computations and torch's own Gaussians."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from rollout.sde import DYNAMICS, Transition, cps, euler, flow_sde, log_prob

LEVELS = st.floats(0.05, 1.0)
STATES = st.floats(-3, 3)


@st.composite
def sigma_pairs(draw: st.DrawFn) -> tuple[float, float]:
    """A current and a lower next noise level inside (0, 1)."""
    sigma = draw(st.floats(0.05, 0.99))
    return sigma, sigma * draw(st.floats(0.1, 0.95))


def tensors(*values: float) -> list[Tensor]:
    return [torch.tensor([[value]], dtype=torch.float64) for value in values]


def scalar_sde(x: float, v: float, sigma: float, nxt: float, level: float) -> tuple[float, float]:
    """Flow-GRPO's step in plain floats, from the drift of its equation 9."""
    s = level * math.sqrt(sigma / (1 - (nxt if sigma == 1 else sigma)))
    drift = v + s * s / (2 * sigma) * (x + (1 - sigma) * v)
    dt = nxt - sigma
    return x + drift * dt, s * math.sqrt(abs(dt))


@given(STATES, STATES, sigma_pairs(), LEVELS)
def test_sde_is_the_published_formula(x: float, v: float, sigmas: tuple[float, float], level: float) -> None:
    move = flow_sde(*tensors(x, v, *sigmas), level)
    mean, std = scalar_sde(x, v, *sigmas, level)
    assert move.mean.item() == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert move.std.item() == pytest.approx(std, rel=1e-9)


@given(STATES, STATES, st.floats(0.1, 0.95), LEVELS)
def test_at_full_noise_the_next_sigma_stands_in(x: float, v: float, nxt: float, level: float) -> None:
    move = flow_sde(*tensors(x, v, 1.0, nxt), level)
    mean, std = scalar_sde(x, v, 1.0, nxt, level)
    assert move.mean.item() == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert move.std.item() == pytest.approx(std, rel=1e-9)
    assert std == pytest.approx(level)  # s * sqrt(1 - nxt) = a, whatever the schedule


@pytest.mark.parametrize("name", sorted(DYNAMICS))
@given(x=STATES, v=STATES, sigmas=sigma_pairs())
def test_without_noise_every_dynamics_is_the_ode(
    name: str, x: float, v: float, sigmas: tuple[float, float]
) -> None:
    arguments = tensors(x, v, *sigmas)
    move = DYNAMICS[name](*arguments, 1e-7)
    assert move.mean.item() == pytest.approx(euler(*arguments).item(), abs=1e-9)
    assert move.std.item() < 1e-5


@given(st.floats(-3, 3), st.floats(-3, 3), sigma_pairs(), LEVELS)
def test_cps_keeps_both_coefficients(
    data: float, noise: float, sigmas: tuple[float, float], level: float
) -> None:
    """Of x = (1 - sigma) x0 + sigma x1, x0 keeps 1 - sigma', and the noises' squares sum to sigma'^2."""
    sigma, nxt = sigmas
    start = (1 - sigma) * data + sigma * noise
    move = cps(*tensors(start, noise - data, sigma, nxt), level)
    kept = math.sqrt(nxt**2 - move.std.item() ** 2)
    assert move.mean.item() == pytest.approx((1 - nxt) * data + kept * noise, abs=1e-9)
    assert move.std.item() == pytest.approx(nxt * math.sin(level * math.pi / 2))
    assert kept**2 + move.std.item() ** 2 == pytest.approx(nxt**2)


def test_cps_is_defined_at_full_noise_level() -> None:
    x, v, sigma, nxt = (t.float() for t in tensors(0.4, -0.3, 0.8, 0.6))
    move = cps(x, v, sigma, nxt, 1.0)
    assert torch.isfinite(move.mean).all()
    assert move.mean.item() == pytest.approx((1 - 0.6) * (0.4 + 0.8 * 0.3), abs=1e-3)


def test_euler_lands_on_the_data_of_a_straight_flow() -> None:
    data, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    x, sigmas = noise, torch.tensor([1.0, 0.7, 0.2, 0.0])
    for sigma, nxt in pairwise(sigmas):
        x = euler(x, noise - data, sigma, nxt)
    assert torch.allclose(x, data, atol=1e-6)


@given(st.integers(0, 2**16), st.floats(0.01, 2.0))
def test_log_prob_is_the_mean_of_normal_log_densities(seed: int, std: float) -> None:
    x_next, mean = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    spread = torch.tensor([std, std / 2, 2 * std]).view(3, 1, 1, 1)
    expected = Normal(mean, spread).log_prob(x_next).flatten(1).mean(1)
    assert torch.allclose(log_prob(x_next, Transition(mean, spread)), expected, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 2**16))
def test_the_unscaled_density_is_the_squared_distance(seed: int) -> None:
    x_next, mean = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    move = Transition(mean, torch.full((3, 1, 1, 1), 0.01), "unscaled")
    expected = [-sum((a - b) ** 2 for a, b in zip(x.tolist(), m.tolist(), strict=True)) / 16
                for x, m in zip(x_next.flatten(1), mean.flatten(1), strict=True)]  # fmt: skip
    assert log_prob(x_next, move).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", sorted(DYNAMICS))
def test_gradients_reach_the_velocity(name: str) -> None:
    x, v = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    v.requires_grad_()
    move = DYNAMICS[name](x, v, torch.tensor(0.8), torch.tensor(0.6), 0.7)
    log_prob(x, Transition(move.mean, move.std.expand(2, 1))).sum().backward()
    assert v.grad is not None
    assert v.grad.abs().min() > 0
