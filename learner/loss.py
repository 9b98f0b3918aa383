"""The FlowGRPO objective of one micro-batch of (trajectory, step) pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.sde import Transition


@dataclass(frozen=True, slots=True)
class Objective:
    """Loss to minimise (scalar, weighted sum); surrogate, ratio and KL to the reference per pair, (N,)."""

    loss: Tensor
    surrogate: Tensor
    ratio: Tensor
    kl: Tensor


def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) per pair, and the ratio; all (N,)."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


def guarded_log_ratio(log_ratio: Tensor, current: Transition, behaviour_means: Tensor) -> Tensor:
    """GRPO-Guard's normalised log-ratio (arXiv 2510.22319), (N,).

    A Gaussian's log-ratio has mean -|mean - mean_old|^2 / (2 std^2) under the old policy and a spread that
    falls with std, so early steps are hardly clipped and late ones always. Centred and multiplied by std,
    every step is clipped alike. Its loss is divided by the step size as well, which evens out the gradients.
    """
    shift = gaussian_kl(current, Transition(behaviour_means, current.std))
    return (log_ratio + shift) * _spread(current)


def gaussian_kl(current: Transition, reference: Transition) -> Tensor:
    """KL of two Gaussians of equal spread, a mean over dimensions, (N,)."""
    return _squared(current, reference) / (2 * _spread(current) ** 2)


def flow_grpo_kl(current: Transition, reference: Transition, step_size: Tensor) -> Tensor:
    """The KL as Flow-GRPO's code has it, (N,): divided by 2 s^2 = 2 std^2 / step size.

    It is ``step_size`` = -(sigma' - sigma) times the true KL, so its beta is not portable between
    schedules (its issue 78).
    """
    return gaussian_kl(current, reference) * step_size


def _spread(transition: Transition) -> Tensor:
    return transition.std.flatten(1).squeeze(1)


def _squared(current: Transition, reference: Transition) -> Tensor:
    return ((current.mean - reference.mean) ** 2).flatten(1).mean(1)


def weighted_objective(
    surrogate: Tensor, ratio: Tensor, kl: Tensor, weights: Tensor, beta: float
) -> Objective:
    """Sum over pairs of weight x (surrogate + beta x KL); padded pairs carry weight zero."""
    loss = (weights * (surrogate + beta * kl)).sum()
    return Objective(loss, surrogate.detach(), ratio.detach(), kl.detach())
