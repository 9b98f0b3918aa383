"""FlowGRPO (arXiv 2505.05470): PPO's clipped ratio of stochastic transitions; GRPO-Guard is an option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field, model_validator

from learner.objectives.base import CHOICES, Metric, Models, Objective, ObjectiveSettings, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from learner.minibatch import Transitions, TransitionTable
    from learner.rank_shares import Assignment
    from rollout.families.registry import Schedule
    from rollout.records import Conditioning, Keep, Trajectory
    from rollout.sde import Transition
    from rollout.settings import RolloutSettings

ROUNDING: Final = 1e-4
"""Largest distance of on-policy ratios from 1 that rounding explains in float32."""
CLIPPED: Final = 0.5
"""Share of on-policy ratios beyond the clip range from which a run cannot learn."""
REMEDY: Final = (
    "set learner.micro_batch to rollout.batch, learner.objective.old_log_probs to learner, "
    "or a wider learner.objective.clip"
)


class FlowGRPOSettings(ObjectiveSettings):
    """The keys of ``flow_grpo``."""

    name: Literal["flow_grpo"] = Field("flow_grpo", description=CHOICES)
    clip: float = Field(
        1e-4,
        gt=0,
        description="ratios are clipped to 1 +- this; tiny, since log-probs are means over dimensions "
        "(published: 1e-4)",
    )
    old_log_probs: Literal["sampler", "learner"] = Field(
        "sampler",
        description="learner computes the old log-probs again, a pass more per pair after the batch's first "
        "optimizer step: for samplers that round differently, since compiled or of another kind",
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

    @model_validator(mode="after")
    def _one_source(self) -> FlowGRPOSettings:
        if self.ratio == "guard" and self.old_log_probs == "learner":
            raise ValueError("ratio = 'guard' needs the sampler's means: leave old_log_probs out")
        return self


class FlowGRPO(Objective):
    """The objective that raises the probability of steps towards high rewards, within a clip range."""

    Settings = FlowGRPOSettings
    settings: FlowGRPOSettings
    metrics: ClassVar = (
        Metric(
            name="ratio_max_deviation",
            title="Largest ratio deviation",
            note="The largest distance of a probability ratio from 1, before the first optimizer step.",
            reduce="max",
            fresh=True,
        ),
        Metric(name="ratio_mean"),
        Metric(name="clip_fraction", title="Clipped", note="Share of ratios outside the clip range."),
        Metric(name="kl", title="KL", note="Distance of the step distributions from the reference model's."),
        Metric(
            name="log_ratio",
            title="Log-ratio at the start",
            note="Mean log-ratio before the first optimizer step: 0, unless sampler and learner differ.",
            fresh=True,
        ),
        Metric(name="log_ratio_rms", reduce="rms", fresh=True),
        Metric(name="fresh_clip_fraction", fresh=True),
    )

    @property
    def keeps(self) -> frozenset[Keep]:
        """States and what the ratio needs of the behaviour policy: log-probs, for GRPO-Guard also means."""
        found: set[Keep] = {"states"}
        found |= set() if self.recomputes else {"log_probs"}
        return frozenset(found | ({"means"} if self.settings.ratio == "guard" else set()))

    @property
    def needs_reference(self) -> bool:
        """True if the KL has a positive weight."""
        return self.settings.beta > 0

    @property
    def recomputes(self) -> bool:
        """True if the learner computes the old log-probs itself."""
        return self.settings.old_log_probs == "learner"

    def prepared_passes(self, updates: int) -> float:
        """Count a pass for old log-probs, except on the rows of the first optimizer step."""
        return self.recomputes * (1 - 1 / updates)

    def check(self, rollout: RolloutSettings) -> None:
        """Refuse also GRPO-Guard on densities that are no Gaussians'."""
        if rollout.dynamics == "ode":
            raise ValueError(
                "rollout.dynamics: got 'ode', whose candidates have no log-probabilities, but flow_grpo "
                "learns from cps, sde; nft, awm and dpo (learner.objective.name) learn from any"
            )
        super().check(rollout)
        if self.settings.ratio == "guard" and rollout.log_density != "gaussian":
            raise ValueError(
                "learner.objective.ratio: guard centres the ratio of Gaussians; "
                "set rollout.density to gaussian"
            )

    def minibatches(
        self,
        share: Sequence[Assignment],
        trajectories: Mapping[int, Trajectory],
        conditionings: Mapping[int, Conditioning],
        *,
        schedule: Schedule,
        size: int,
    ) -> TransitionTable:
        """Build the transitions of a share, with clipped advantages."""
        from learner.minibatch import transitions

        clip = self.settings.advantage_clip
        return transitions(share, trajectories, conditionings, schedule, size=size, advantage_clip=clip)

    def prepared(self, models: Models, shares: Sequence[TransitionTable]) -> Sequence[TransitionTable]:
        """Compute the old log-probs with the learner's own weights, if it is to.

        The first share needs none: its optimizer step starts from these weights, so `loss` has them as well.
        """
        if not self.recomputes:
            return shares
        first, *rest = shares
        return [
            first.without_log_probs(),
            *(share.with_log_probs(_log_probs(models, share)) for share in rest),
        ]

    def loss(self, models: Models, part: Transitions) -> Terms:
        """Compute max(-A ratio, -A clip(ratio, 1 +- c)) + beta KL per row.

        Without old log-probs, the policy's own are the old ones.
        """
        from rollout.sde import log_prob

        settings, step_size = self.settings, part.sigmas - part.next_sigmas
        reference = models.reference.transition(part) if models.reference else None
        move = models.policy.transition(part)
        log_probs = log_prob(part.next_states, move)
        log_ratio = log_probs - (part.log_probs if len(part.log_probs) else log_probs.detach())
        if settings.ratio == "guard":
            log_ratio = grpo_guard_log_ratio(log_ratio, move, part.means)
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
        clipped, log_ratio = off > self.settings.clip, ratio.log()
        return {
            "ratio_max_deviation": off,
            "ratio_mean": ratio,
            "clip_fraction": clipped,
            "kl": kl,
            "log_ratio": log_ratio,
            "log_ratio_rms": log_ratio,
            "fresh_clip_fraction": clipped,
        }

    def healthy(self, metrics: Mapping[str, float], *, on_policy: bool, dtype: str) -> str:
        """Report on-policy ratios that rounding cannot explain, or of which most have no gradient left.

        Rounding shifts log-ratios downwards, by half the mean square of its effect in units of the step's
        standard deviation. Beyond the clip range, candidates with negative advantages then lose their
        gradient and the others do not.
        """
        if not on_policy:
            return ""
        off, lost = metrics["ratio_max_deviation"], metrics["fresh_clip_fraction"]
        if dtype == "float32" and off > ROUNDING:
            return (
                f"sampler and learner disagree: on-policy ratios are off by {off:.2g}, "
                f"more than {ROUNDING:g} in float32"
            )
        if lost > CLIPPED:
            return (
                f"sampler and learner disagree: {lost:.0%} of the on-policy ratios are beyond the clip range "
                f"of {self.settings.clip:g} in {dtype}, so most candidates have no gradient; {REMEDY}"
            )
        return ""

    def doubts(self, metrics: Mapping[str, float], *, on_policy: bool) -> str:
        """Report steps whose on-policy log-ratios are, on average, beyond half the clip range."""
        half = self.settings.clip / 2
        found = {name: value for name, value in metrics.items() if name.startswith("log_ratio_rms.t")}
        step, worst = max(found.items(), key=lambda one: one[1], default=("", 0.0))
        if not on_policy or worst <= half:
            return ""
        number = step.removeprefix("log_ratio_rms.t")
        mean = metrics[f"log_ratio.t{number}"]
        return (
            f"at denoising step {number}, on-policy log-ratios have mean {mean:.2g} and "
            f"spread {worst:.2g}, more than half the clip range of {self.settings.clip:g}: {REMEDY}"
        )


def _log_probs(models: Models, share: TransitionTable) -> list[Tensor]:
    """Compute the log-probs of a share by the policy, by mini-batch.

    The passes record gradients, which nobody uses: once compiled, those without are other kernels, which
    round differently.
    """
    from rollout.sde import log_prob

    return [log_prob(part.next_states, models.policy.transition(part)).detach() for part in share]


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Compute PPO's clipped surrogate per row, negated, and the ratio; all (N,).

    Source: arXiv 1707.06347, equation 7.
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return (-advantages * ratio).maximum(-advantages * clipped), ratio


def grpo_guard_log_ratio(log_ratio: Tensor, current: Transition, behaviour_means: Tensor) -> Tensor:
    """Compute GRPO-Guard's normalised log-ratio, (N,).

    Under the behaviour policy, a Gaussian's log-ratio has mean -|mean - mean_old|^2 / (2 std^2) and a spread
    that falls with std, so that early steps are hardly ever clipped and late ones always. After centring and
    multiplication by std, every step is clipped alike. The loss is also divided by the step size, which evens
    out the gradients. Source: arXiv 2510.22319.
    """
    shift = gaussian_kl(current, replace(current, mean=behaviour_means))
    return (log_ratio + shift) * _spread(current)


def gaussian_kl(current: Transition, reference: Transition) -> Tensor:
    """Compute the KL of two Gaussians of equal spread, a mean over dimensions, (N,)."""
    squared = ((current.mean - reference.mean) ** 2).flatten(1).mean(1)
    return squared / (2 * _spread(current) ** 2)


def flow_grpo_kl(current: Transition, reference: Transition, step_size: Tensor) -> Tensor:
    """Compute the KL as Flow-GRPO's code does, (N,): divided by 2 s^2 = 2 std^2 / step size.

    It is ``step_size`` = -(sigma' - sigma) times the true KL, so its beta is not portable between schedules
    (issue 78 of that code).
    """
    return gaussian_kl(current, reference) * step_size


def _spread(transition: Transition) -> Tensor:
    return transition.std.flatten(1).squeeze(1)
