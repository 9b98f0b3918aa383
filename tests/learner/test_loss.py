"""The objective of a micro-batch: clipping by hand, and the two KL conventions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from learner.loss import (
    clipped_objective,
    flow_grpo_kl,
    gaussian_kl,
    guarded_log_ratio,
    weighted_objective,
)
from rollout.sde import Transition, log_prob

CLIP = 0.2


def one(ratio: float, advantage: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Surrogate and its gradient in the log-prob, for a single pair."""
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    surrogate, found = clipped_objective(log_prob, torch.tensor([advantage]), CLIP)
    assert found.item() == pytest.approx(ratio, rel=1e-5)
    (gradient,) = torch.autograd.grad(surrogate.sum(), log_prob)
    return surrogate, gradient


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),  # inside the range: the plain policy gradient
        (1.5, 2.0, -2.4, 0.0),  # good and already more likely: cut, no gradient
        (0.5, 2.0, -1.0, -1.0),  # good and less likely: never cut
        (1.5, -2.0, 3.0, 3.0),  # bad and more likely: never cut
        (0.5, -2.0, 1.6, 0.0),  # bad and already less likely: cut, no gradient
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, surrogate: float, gradient: float) -> None:
    found, slope = one(ratio, advantage)
    assert found.item() == pytest.approx(surrogate, rel=1e-5)
    assert slope.item() == pytest.approx(gradient, rel=1e-5)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(-100, 100))
def test_on_policy_the_surrogate_is_minus_the_advantage(advantages: list[float], log_prob: float) -> None:
    given_advantages = torch.tensor(advantages)
    log_probs = torch.full_like(given_advantages, log_prob)
    surrogate, ratio = clipped_objective(log_probs - log_probs.clone(), given_advantages, 1e-4)
    assert torch.equal(ratio, torch.ones_like(ratio))
    assert torch.equal(surrogate, -given_advantages)


@given(st.floats(-1, 1), st.floats(-5, 5))
def test_clipping_only_ever_raises_the_loss(shift: float, advantage: float) -> None:
    surrogate, _ = clipped_objective(torch.tensor([shift]), torch.tensor([advantage]), CLIP)
    assert surrogate.item() >= -advantage * math.exp(shift) - 1e-5


def moves(seed: int) -> tuple[Transition, Transition]:
    generator = torch.Generator().manual_seed(seed)
    std = torch.rand(3, 1, 1, 1, generator=generator) + 0.1
    a, b = torch.randn(2, 3, 2, 4, 4, generator=generator)
    return Transition(a, std), Transition(b, std)


@given(st.integers(0, 2**16))
def test_gaussian_kl_is_torchs_own(seed: int) -> None:
    current, reference = moves(seed)
    expected = kl_divergence(Normal(current.mean, current.std), Normal(reference.mean, reference.std))
    assert torch.allclose(gaussian_kl(current, reference), expected.flatten(1).mean(1), rtol=1e-4)


def test_the_kl_to_oneself_is_zero() -> None:
    current, _ = moves(0)
    assert torch.equal(gaussian_kl(current, current), torch.zeros(3))


@given(st.integers(0, 2**16), st.floats(0.01, 0.5))
def test_flow_grpos_kl_lacks_the_step_size(seed: int, step_size: float) -> None:
    """std = s sqrt(step size), and upstream divides by 2 s^2."""
    current, reference = moves(seed)
    s = current.std.flatten() / math.sqrt(step_size)
    upstream = ((current.mean - reference.mean) ** 2).mean(dim=(1, 2, 3)) / (2 * s**2)
    found = flow_grpo_kl(current, reference, torch.full((3,), step_size))
    assert torch.allclose(found, upstream, rtol=1e-4)
    assert torch.allclose(found, gaussian_kl(current, reference) * step_size)


def test_the_objective_is_a_weighted_sum() -> None:
    surrogate, ratio = torch.tensor([1.0, -2.0, 9.0]), torch.tensor([1.0, 1.1, 5.0])
    kl, weights = torch.tensor([0.5, 1.5, 7.0]), torch.tensor([0.25, 0.75, 0.0])
    found = weighted_objective(surrogate, ratio, kl, weights, beta=0.1)
    assert found.loss.item() == pytest.approx(0.25 * (1 + 0.05) + 0.75 * (-2 + 0.15))
    assert torch.equal(found.ratio, ratio)
    assert torch.equal(found.kl, kl)


def test_what_is_reported_holds_no_graph() -> None:
    values = torch.ones(2, requires_grad=True)
    found = weighted_objective(values, values * 2, values * 3, torch.ones(2), beta=1.0)
    assert found.loss.requires_grad
    assert not found.ratio.requires_grad
    assert not found.kl.requires_grad


@given(st.integers(0, 2**16))
def test_guards_ratio_is_centred_and_as_wide_on_every_step(seed: int) -> None:
    """The log-ratio becomes the noise's part along the shift of the mean, whatever the std."""
    generator = torch.Generator().manual_seed(seed)
    shift, noise = torch.randn(2, 1, 3, 8, 8, generator=generator).expand(2, 4, 3, 8, 8)
    std = torch.tensor([0.01, 0.1, 0.7, 2.0]).view(4, 1, 1, 1)
    old = Transition(torch.zeros(4, 3, 8, 8), std)
    new = Transition(0.01 * shift, std)
    x = old.mean + std * noise
    log_ratio = log_prob(x, new) - log_prob(x, old)
    found = guarded_log_ratio(log_ratio, new, old.mean)
    assert torch.allclose(found, (0.01 * shift * noise).flatten(1).mean(1), rtol=1e-2, atol=2e-5)
    assert torch.allclose(guarded_log_ratio(torch.zeros(4), old, old.mean), torch.zeros(4))
