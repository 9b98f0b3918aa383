"""Advantage Weighted Matching (arXiv 2509.25050): PPO on the matching error as a log-probability.

With the velocity u of the straight path through a noised candidate, log p = -w(|v - u|^2, t) for the policy
and for the behaviour policy at the same noise; their ratio is clipped as in PPO. Two squared distances of
velocities are added: from the behaviour policy's, without which the policy diverges, and from the start
policy's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field

from learner.objectives.base import CHOICES, Metric, Models, Terms
from learner.objectives.flow_grpo import clipped_surrogate
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

SMALLEST: Final = 1e-10
"""Added to a squared error before its root is taken, whose slope is infinite at 0, as in AWM's code."""


class AWMSettings(LaggingSettings):
    """The keys of ``awm``."""

    name: Literal["awm"] = Field("awm", description=CHOICES)
    ratio_clip: float = Field(1.0, gt=0, description="ratios are clipped to 1 +- this (published: 1)")
    weighting: Literal["uniform", "root", "quarter"] = Field(
        "uniform",
        description="log-probability: minus the squared error; or t times twice its square root, or 4 times "
        "its fourth root, which give noisy states less weight (published: quarter)",
    )
    proximal_weight: float = Field(
        1.0,
        ge=0,
        description="weight of the squared distance of velocities from the behaviour policy's (published: 1)",
    )


class AWM(LaggingObjective):
    """The objective that lowers the matching error of good candidates and raises that of bad ones."""

    Settings = AWMSettings
    settings: AWMSettings
    metrics: ClassVar[tuple[Metric, ...]] = (
        *LaggingObjective.metrics,
        Metric(name="ratio_mean"),
        Metric(name="clip_fraction", title="Clipped", note="Share of ratios outside the clip range."),
    )

    def loss(self, models: Models, part: Noised) -> Terms:
        """Compute the loss of every row."""
        settings, start = self.settings, start_velocity(models, part)
        velocity = models.policy.velocity(part)
        old, target = old_velocity(part, velocity), part.target
        error = mean_square(velocity - target)
        log_ratio = self._log_prob(error, part.sigmas) - self._log_prob(
            mean_square(old - target), part.sigmas
        )
        surrogate, ratio = clipped_surrogate(
            log_ratio, part.advantages / settings.reward_clip, settings.ratio_clip
        )
        moved, distance = mean_square(velocity - old), strayed(velocity, start)
        return Terms(
            losses=surrogate + settings.proximal_weight * moved + settings.kl_weight * distance,
            prediction=velocity,
            metrics={
                "matching_error": error,
                "moved": moved,
                "kl": distance,
                "ratio_mean": ratio,
                "clip_fraction": (ratio - 1).abs() > settings.ratio_clip,
            },
        )

    def _log_prob(self, error: Tensor, sigmas: Tensor) -> Tensor:
        """Compute the log-probabilities of squared errors (N,) at noise levels (N,), up to a constant."""
        if self.settings.weighting == "uniform":
            return -error
        power = 0.5 if self.settings.weighting == "root" else 0.25
        return -sigmas * (error + SMALLEST) ** power / power
