"""The FlowGRPO objective of one micro-batch of (trajectory, step) pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.sde import Transition


@dataclass(frozen=True, slots=True)
class Objective:
    """Loss to minimise (scalar, weighted sum), and per pair the ratio and the KL to the reference."""

    loss: Tensor
    ratio: Tensor
    kl: Tensor


def clipped_objective(
    log_probs: Tensor, behaviour: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) per pair, and the ratio; all (N,)."""
    ratio = (log_probs - behaviour).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


def gaussian_kl(current: Transition, reference: Transition) -> Tensor:
    """KL of two Gaussians of equal spread, a mean over dimensions, (N,)."""
    return _squared(current, reference) / (2 * current.std.flatten(1).squeeze(1) ** 2)


def flow_grpo_kl(current: Transition, reference: Transition, step_size: Tensor) -> Tensor:
    """The KL as Flow-GRPO's code has it, (N,): divided by 2 s^2 = 2 std^2 / step size.

    It is ``step_size`` = -(sigma' - sigma) times the true KL, so its beta is not portable between
    schedules (its issue 78).
    """
    return gaussian_kl(current, reference) * step_size


def _squared(current: Transition, reference: Transition) -> Tensor:
    return ((current.mean - reference.mean) ** 2).flatten(1).mean(1)


def weighted_objective(
    surrogate: Tensor, ratio: Tensor, kl: Tensor, weights: Tensor, beta: float
) -> Objective:
    """Sum over pairs of weight x (surrogate + beta x KL); padded pairs carry weight zero."""
    return Objective((weights * (surrogate + beta * kl)).sum(), ratio.detach(), kl.detach())
