"""Reward-weighted regression on the sampled steps: log-probabilities weighted by exp(advantage / T).

An objective of your own has settings, metrics, a loss and a check. README.md has the command that runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from learner.objectives.base import Metric, Models, Objective, ObjectiveSettings, Terms

if TYPE_CHECKING:  # the driver of a run imports this file as well, without torch
    from learner.minibatch import Transitions


class RegressionSettings(ObjectiveSettings):
    """The keys of ``[learner.objective]`` beside the name."""

    temperature: float = Field(1.0, gt=0, description="T; a small one gives the best candidates more weight")


class RewardWeightedRegression(Objective):
    """The loss -exp(A / T) log p(next state | state) under the policy (Peters and Schaal 2007)."""

    Settings = RegressionSettings
    settings: RegressionSettings
    keeps = frozenset({"states"})
    metrics: ClassVar = (
        Metric(
            name="log_prob", title="Log-probability", note="Of the sampled steps, a mean over dimensions."
        ),
        Metric(name="largest_weight", title="Largest weight", note="exp(A / T) at most.", reduce="max"),
    )

    def loss(self, models: Models, part: Transitions) -> Terms:
        """Compute the weighted negative log-probability of every row."""
        from rollout.sde import log_prob

        move = models.policy.transition(part)
        weight = (part.advantages / self.settings.temperature).exp()
        found = log_prob(part.next_states, move)
        return Terms(
            losses=-weight * found,
            prediction=move.mean,
            metrics={"log_prob": found, "largest_weight": weight},
        )

    def healthy(self, metrics: Mapping[str, float], *, on_policy: bool, dtype: str) -> str:
        """Report a weight so large that one candidate outweighs all others."""
        largest = metrics["largest_weight"]
        if largest < 1e4:
            return ""
        return (
            f"a weight is {largest:.3g}, so that one candidate decides: raise learner.objective.temperature "
            f"({self.settings.temperature:g})"
        )
