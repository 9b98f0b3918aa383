"""FlowGRPO (arXiv 2505.05470): PPO's clipped ratio of stochastic transitions; GRPO-Guard is an option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field

from learner.objectives.base import Metric, Models, Objective, ObjectiveSettings, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from learner.minibatch import Transitions
    from learner.rank_shares import Item
    from rollout.families.registry import Schedule
    from rollout.records import Conditioning, Keep, Trajectory
    from rollout.sde import Transition

RATIO_TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest distance of on-policy ratios from one at which sampler and learner still count as equal."""


class FlowGRPOSettings(ObjectiveSettings):
    """The keys of ``flow_grpo``."""

    name: Literal["flow_grpo"] = Field(
        "flow_grpo", description="the objective: flow_grpo, or module:Class of your own"
    )
    clip: float = Field(
        1e-4,
        gt=0,
        description="ratios are clipped to 1 +- this; tiny, since log-probs are means over dimensions "
        "(published: 1e-4)",
    )
    ratio: Literal["plain", "guard"] = Field(
        "plain", description="guard centres each step's ratio and evens out the steps (GRPO-Guard)"
    )
    advantage_clip: float = Field(
        5.0, gt=0, description="advantages are cut at plus and minus this (published: 5)"
    )
    beta: float = Field(
        0.0,
        ge=0,
        description="weight of the KL to the frozen start policy; 0 turns it off (published: 0.04, for "
        "PickScore 0.01, with kl = flow_grpo)",
    )
    kl: Literal["gaussian", "flow_grpo"] = Field(
        "gaussian", description="gaussian divides by 2 std^2; flow_grpo by 2 s^2, without the step size"
    )


class FlowGRPO(Objective):
    """Raise the probability of stochastic steps that led to good images, within a clip range."""

    Settings = FlowGRPOSettings
    settings: FlowGRPOSettings
    metrics: ClassVar = (
        Metric(
            name="ratio_max_deviation",
            title="Largest ratio deviation",
            note="How far any probability ratio is from 1.",
            reduce="max",
            fresh=True,
        ),
        Metric(name="ratio_mean"),
        Metric(name="clip_fraction", title="Clipped", note="Share of ratios that the clip range cut."),
        Metric(name="kl", title="KL", note="Distance of the step distributions from the reference model's."),
        Metric(name="drift", fresh=True),
    )

    @property
    def keeps(self) -> frozenset[Keep]:
        """States and log-probs; for GRPO-Guard also the means of the behaviour policy."""
        return super().keeps | (frozenset({"means"}) if self.settings.ratio == "guard" else frozenset())

    @property
    def needs_reference(self) -> bool:
        """True if the KL has a weight."""
        return self.settings.beta > 0

    def minibatches(
        self,
        share: Sequence[Item],
        trajectories: Mapping[int, Trajectory],
        conditionings: Mapping[int, Conditioning],
        *,
        schedule: Schedule,
        size: int,
    ) -> Iterator[Transitions]:
        """Lay out transitions, their advantages cut."""
        from learner.minibatch import transitions

        cut = self.settings.advantage_clip
        rows = transitions(share, trajectories, conditionings, schedule, advantage_clip=cut)
        return rows.split(size)

    def loss(self, models: Models, part: Transitions) -> Terms:
        """Compute max(-A ratio, -A clip(ratio, 1 +- c)) + beta KL per row."""
        from rollout.sde import log_prob

        settings, step_size = self.settings, part.sigmas - part.next_sigmas
        reference = models.reference.transition(part) if models.reference else None
        move = models.policy.transition(part)
        log_ratio = log_prob(part.next_states, move) - part.log_probs
        if settings.ratio == "guard":
            log_ratio = guarded_log_ratio(log_ratio, move, part.means)
        surrogate, ratio = clipped_surrogate(log_ratio, part.advantages, settings.clip)
        if settings.ratio == "guard":
            surrogate = surrogate / step_size
        kl = ratio.new_zeros(ratio.shape)
        if reference is not None:
            kl = gaussian_kl(move, reference)
            kl = flow_grpo_kl(move, reference, step_size) if settings.kl == "flow_grpo" else kl
        return Terms(
            losses=surrogate + settings.beta * kl, prediction=move.mean, metrics=self._figures(ratio, kl)
        )

    def _figures(self, ratio: Tensor, kl: Tensor) -> dict[str, Tensor]:
        off = (ratio - 1).abs()
        return {
            "ratio_max_deviation": off,
            "ratio_mean": ratio,
            "clip_fraction": off > self.settings.clip,
            "kl": kl,
            "drift": ratio.log().abs(),
        }

    def healthy(self, metrics: Mapping[str, float], *, on_policy: bool, dtype: str) -> str:
        """Refuse on-policy ratios other than one beyond rounding, which are a defect and not a fact."""
        off, tolerance = metrics["ratio_max_deviation"], RATIO_TOLERANCE[dtype]
        if not on_policy or not off > tolerance:
            return ""
        return (
            f"sampler and learner disagree: on-policy ratios are off by {off:.2g}, "
            f"more than {tolerance:g} in {dtype}"
        )


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) per pair, and the ratio; all (N,)."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return (-advantages * ratio).maximum(-advantages * clipped), ratio


def guarded_log_ratio(log_ratio: Tensor, current: Transition, behaviour_means: Tensor) -> Tensor:
    """GRPO-Guard's normalised log-ratio (arXiv 2510.22319), (N,).

    A Gaussian's log-ratio has mean -|mean - mean_old|^2 / (2 std^2) under the old policy and a spread that
    falls with std, so early steps are hardly clipped and late ones always. Centred and multiplied by std,
    every step is clipped alike. Its loss is divided by the step size as well, which evens out the gradients.
    """
    shift = gaussian_kl(current, replace(current, mean=behaviour_means))
    return (log_ratio + shift) * _spread(current)


def gaussian_kl(current: Transition, reference: Transition) -> Tensor:
    """KL of two Gaussians of equal spread, a mean over dimensions, (N,)."""
    squared = ((current.mean - reference.mean) ** 2).flatten(1).mean(1)
    return squared / (2 * _spread(current) ** 2)


def flow_grpo_kl(current: Transition, reference: Transition, step_size: Tensor) -> Tensor:
    """The KL as Flow-GRPO's code has it, (N,): divided by 2 s^2 = 2 std^2 / step size.

    It is ``step_size`` = -(sigma' - sigma) times the true KL, so its beta is not portable between
    schedules (its issue 78).
    """
    return gaussian_kl(current, reference) * step_size


def _spread(transition: Transition) -> Tensor:
    return transition.std.flatten(1).squeeze(1)
