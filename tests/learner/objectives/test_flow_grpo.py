"""FlowGRPO: clipping by hand, the two KL conventions, GRPO-Guard's ratio, the loss and what it declares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from learner.minibatch import Transitions
from learner.objectives.base import Models, Terms
from learner.objectives.flow_grpo import (
    FlowGRPO,
    FlowGRPOSettings,
    clipped_surrogate,
    flow_grpo_kl,
    gaussian_kl,
    grpo_guard_log_ratio,
)
from rollout.sde import Transition, log_prob

CLIP = 0.2


def one(ratio: float, advantage: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Surrogate and its gradient in the log-prob, for a single pair."""
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    surrogate, found = clipped_surrogate(log_prob, torch.tensor([advantage]), CLIP)
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
    surrogate, ratio = clipped_surrogate(log_probs - log_probs.clone(), given_advantages, 1e-4)
    assert torch.equal(ratio, torch.ones_like(ratio))
    assert torch.equal(surrogate, -given_advantages)


@given(st.floats(-1, 1), st.floats(-5, 5))
def test_clipping_only_ever_raises_the_loss(shift: float, advantage: float) -> None:
    surrogate, _ = clipped_surrogate(torch.tensor([shift]), torch.tensor([advantage]), CLIP)
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


class Fixed:
    """A predictor that gives one distribution, whatever it is asked."""

    def __init__(self, move: Transition) -> None:
        self.move = move

    def transition(self, part: Any) -> Transition:
        return self.move


def terms(reference: bool = True, **changes: Any) -> tuple[Terms, Transition, Transition, Transitions]:
    """The terms of three rows whose policy and reference differ, and what they were made of."""
    current, other = moves(5)
    zeros = torch.zeros(3)
    part = Transitions(
        advantages=torch.tensor([1.0, -2.0, 0.5]), weights=zeros, steps=zeros.long(), candidates=zeros.long(),
        groups=zeros.long(), embeddings={}, states=zeros, next_states=current.mean + 0.3, sigmas=zeros + 0.7,
        next_sigmas=zeros + 0.5, timesteps=zeros, means=current.mean - 0.1,
        log_probs=log_prob(current.mean + 0.3, current) - torch.tensor([0.0, 0.1, 0.3]),
    )  # fmt: skip
    policy: Any = Fixed(current)
    frozen: Any = Fixed(other) if reference else None
    objective = FlowGRPO(FlowGRPOSettings(**{"clip": CLIP, **changes}))
    return objective.loss(Models(policy=policy, reference=frozen), part), current, other, part


def test_the_loss_is_the_clipped_surrogate_plus_beta_times_the_kl() -> None:
    found, current, other, _ = terms(beta=0.25)
    ratios = [1.0, math.exp(0.1), math.exp(0.3)]
    surrogates = [-1.0, 2 * math.exp(0.1), -0.5 * (1 + CLIP)]  # the last ratio is cut
    kl = gaussian_kl(current, other)
    assert found.losses.tolist() == pytest.approx(
        [s + 0.25 * k for s, k in zip(surrogates, kl.tolist(), strict=True)], rel=1e-4
    )
    assert found.prediction is current.mean
    assert found.metrics["ratio_mean"].tolist() == pytest.approx(ratios, rel=1e-4)
    assert found.metrics["ratio_max_deviation"].tolist() == pytest.approx([r - 1 for r in ratios], abs=1e-4)
    assert found.metrics["clip_fraction"].tolist() == [False, False, True]
    for name in ("log_ratio", "log_ratio_rms"):
        assert found.metrics[name].tolist() == pytest.approx([0.0, 0.1, 0.3], abs=1e-4)
    assert found.metrics["fresh_clip_fraction"].tolist() == [False, False, True]
    assert torch.equal(found.metrics["kl"], kl)


def test_without_a_reference_there_is_no_kl() -> None:
    found, *_ = terms(reference=False)
    assert torch.equal(found.metrics["kl"], torch.zeros(3))


def test_flow_grpos_kl_is_an_option() -> None:
    found, current, other, part = terms(beta=1.0, kl="flow_grpo")
    assert torch.equal(found.metrics["kl"], flow_grpo_kl(current, other, part.sigmas - part.next_sigmas))


def test_guards_loss_is_divided_by_the_step_size() -> None:
    found, current, _, part = terms(reference=False, ratio="guard")
    log_ratio = grpo_guard_log_ratio(torch.tensor([0.0, 0.1, 0.3]), current, part.means)
    surrogate, _ = clipped_surrogate(log_ratio, part.advantages, CLIP)
    assert torch.allclose(found.losses, surrogate / 0.2, rtol=1e-3)


def test_what_it_needs_follows_from_its_settings() -> None:
    plain, guard = FlowGRPO(FlowGRPOSettings()), FlowGRPO(FlowGRPOSettings(ratio="guard", beta=0.1))
    assert plain.keeps == {"states", "log_probs"}
    assert FlowGRPO(FlowGRPOSettings(old_log_probs="learner")).keeps == {"states"}
    assert guard.keeps == {"states", "log_probs", "means"}
    assert (plain.needs_reference, guard.needs_reference) == (False, True)


@pytest.mark.parametrize(
    ("deviation", "clipped", "on_policy", "dtype", "words"),
    [
        (5e-5, 0.0, True, "float32", ""),
        (2e-4, 0.1, True, "float32", "off by 0.0002, more than 0.0001 in float32"),
        (2e-4, 0.5, True, "float16", ""),
        (
            2e-4,
            0.51,
            True,
            "float16",
            "51% of the on-policy ratios are beyond the clip range of 0.0001 in float16",
        ),
        (0.3, 0.9, True, "bfloat16", "so most candidates have no gradient"),
        (0.3, 0.9, False, "float32", ""),
    ],
)
def test_on_policy_ratios_other_than_one_are_a_defect(
    deviation: float, clipped: float, on_policy: bool, dtype: str, words: str
) -> None:
    metrics = {"ratio_max_deviation": deviation, "fresh_clip_fraction": clipped}
    found = FlowGRPO(FlowGRPOSettings()).healthy(metrics, on_policy=on_policy, dtype=dtype)
    assert (words in found) if words else not found


@pytest.mark.parametrize(
    ("clip", "on_policy", "doubted"), [(1e-4, True, True), (3e-4, True, False), (1e-4, False, False)]
)
def test_a_step_whose_log_ratios_reach_half_the_clip_range_is_doubted(
    clip: float, on_policy: bool, doubted: bool
) -> None:
    metrics = {
        "log_ratio.t3": -1e-6,
        "log_ratio_rms.t3": 2e-6,
        "log_ratio.t7": -7e-5,
        "log_ratio_rms.t7": 9e-5,
    }
    found = FlowGRPO(FlowGRPOSettings(clip=clip)).doubts(metrics, on_policy=on_policy)
    assert bool(found) == doubted
    if doubted:
        assert "at denoising step 7, on-policy log-ratios have mean -7e-05 and spread 9e-05" in found
        assert "learner.objective.old_log_probs" in found


def test_guard_needs_the_samplers_means() -> None:
    with pytest.raises(ValueError, match="ratio = 'guard' needs the sampler's means"):
        FlowGRPOSettings(ratio="guard", old_log_probs="learner")


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
    found = grpo_guard_log_ratio(log_ratio, new, old.mean)
    assert torch.allclose(found, (0.01 * shift * noise).flatten(1).mean(1), rtol=1e-2, atol=2e-5)
    assert torch.allclose(grpo_guard_log_ratio(torch.zeros(4), old, old.mean), torch.zeros(4))
