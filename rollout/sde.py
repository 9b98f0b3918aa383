"""The maths of one denoising step, shared by rollout and learner so that on-policy ratios are exactly one.

Time runs from noise (sigma = 1) to image (sigma = 0); the velocity points from image to noise, so that
x = (1 - sigma) x0 + sigma x1 and v = x1 - x0. All computation is in float32, whatever the model's precision.
Every tensor ``x`` is (N, ...); every sigma broadcasts against it, (N, 1, ...) or a scalar tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

HALF_LOG_TAU: Final = 0.5 * math.log(2 * math.pi)
Density = Literal["gaussian", "unscaled"]


@dataclass(frozen=True, slots=True)
class Transition:
    """The Gaussian that a stochastic step draws its next state from; ``std`` broadcasts against ``mean``.

    ``density`` says how its log density is computed.
    """

    mean: Tensor
    std: Tensor
    density: Density = "gaussian"


def flow_sde(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float) -> Transition:
    """Compute a step of Flow-GRPO's reverse SDE (arXiv 2505.05470, equation 9) by Euler-Maruyama."""
    delta = sigma_next - sigma
    # At sigma = 1 the diffusion coefficient diverges; as upstream, the next sigma of the schedule is used.
    remaining = 1 - torch.where(sigma >= 1, sigma_next, sigma)
    s = noise_level * (sigma / remaining).sqrt()
    spread = s**2 * delta / (2 * sigma)
    mean = x * (1 + spread) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * delta
    return Transition(mean, s * (-delta).sqrt())


def cps(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float) -> Transition:
    """Compute a step of coefficient-preserving sampling (arXiv 2509.05952), with exactly sigma' of noise."""
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    x0 = x - sigma * v
    x1 = x + (1 - sigma) * v
    return Transition((1 - sigma_next) * x0 + (sigma_next**2 - std**2).sqrt() * x1, std)


Dynamics = Callable[[Tensor, Tensor, Tensor, Tensor, float], Transition]

DYNAMICS: Final[dict[str, Dynamics]] = {"sde": flow_sde, "cps": cps}


def euler(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Take one step of the probability-flow ODE."""
    return x + (sigma_next - sigma) * v


def log_prob(x_next: Tensor, transition: Transition) -> Tensor:
    """Compute the log density of the next state, (N,), as a *mean* over dimensions, as in Flow-GRPO.

    The mean makes its size independent of the resolution; clip ranges are accordingly tiny (1e-4). The
    unscaled density is -(x' - mean)^2, without the division by 2 std^2, as the public implementations of CPS
    have it: the std of CPS falls with sigma', and a division by it leaves the last trained step nearly all of
    the gradient.
    """
    if transition.density == "unscaled":
        return -((x_next - transition.mean) ** 2).flatten(1).mean(1)
    z = (x_next - transition.mean) / transition.std
    density = -0.5 * z**2 - transition.std.log() - HALF_LOG_TAU
    return density.flatten(1).mean(1)
