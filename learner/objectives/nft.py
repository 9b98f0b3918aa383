"""DiffusionNFT (arXiv 2509.16117): good candidates pull the velocity, bad ones push it.

With the reward r in [0, 1], the policy's velocity v and the behaviour policy's v_old, the loss of a row is

    (r |x+ - x0|^2 / w+ + (1 - r) |x- - x0|^2 / w-) / b
    x+ = x - t ((1 - b) v_old + b v),  x- = x - t ((1 + b) v_old - b v),  w = mean |x' - x0|, a constant

In v it is a parabola about v_old + (2 r - 1) (u - v_old) / b, so that every optimizer step after the first
one of a batch is also held back towards the behaviour policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field

from learner.objectives.base import CHOICES, Metric, Models, Terms
from learner.objectives.forward_process import (
    LaggingObjective,
    LaggingSettings,
    mean_square,
    old_velocity,
    start_velocity,
    strayed,
)

if TYPE_CHECKING:
    from torch import Tensor

    from learner.noised import Noised

SMALLEST: Final = 1e-5
"""The smallest mean absolute error by which a squared error is divided, as in DiffusionNFT's code."""


class NFTSettings(LaggingSettings):
    """The keys of ``nft``."""

    name: Literal["nft"] = Field("nft", description=CHOICES)
    strength: float = Field(
        1.0,
        gt=0,
        description="how far a candidate may move the policy from the behaviour policy: the smaller, the "
        "farther (beta; published: 1, for OCR 0.1)",
    )


class NFT(LaggingObjective):
    """The objective that contrasts an implicit positive policy with an implicit negative one."""

    Settings = NFTSettings
    settings: NFTSettings
    metrics: ClassVar[tuple[Metric, ...]] = (
        *LaggingObjective.metrics,
        Metric(name="reward_weight", title="Reward in [0, 1]", note="The weight r of the positive policy."),
    )

    def loss(self, models: Models, part: Noised) -> Terms:
        """Compute the loss of every row."""
        settings, start = self.settings, start_velocity(models, part)
        velocity = models.policy.velocity(part)
        old = old_velocity(part, velocity)
        reward = (part.advantages / settings.reward_clip + 1) / 2
        step = settings.strength * (velocity - old)
        losses = (
            reward * normalised_error(part, old + step) + (1 - reward) * normalised_error(part, old - step)
        ) / settings.strength
        distance = strayed(velocity, start)
        return Terms(
            losses=losses + settings.kl_weight * distance,
            prediction=velocity,
            metrics={
                "matching_error": mean_square(velocity - part.target),
                "moved": mean_square(velocity - old),
                "kl": distance,
                "reward_weight": reward,
            },
        )


def normalised_error(part: Noised, velocity: Tensor) -> Tensor:
    """Compute the mean square of the clean latents' error over its mean absolute value, per row (N,)."""
    error = part.states - part.levels * velocity - part.clean
    size = error.detach().abs().flatten(1).mean(1)
    return mean_square(error) / size.clamp(min=SMALLEST)
