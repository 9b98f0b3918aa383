"""The base of objectives on the forward process: they compare velocities at noised clean latents.

With clean latents x0, noise e and a noise level t, the state is x = (1 - t) x0 + t e and the velocity of the
straight path through it is u = e - x0. Such an objective needs no step of the sampler: any dynamics and any
solver will do, and one clean latent per candidate is all that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field

from learner.objectives.base import Metric, Models, Objective, ObjectiveSettings
from learner.records import Unit

if TYPE_CHECKING:
    from torch import Tensor

    from learner.noised import Noised, NoisedTable
    from learner.rank_shares import Assignment
    from rollout.families.registry import Schedule
    from rollout.records import Conditioning, Keep, Trajectory
    from rollout.settings import RolloutSettings
    from selection.records import Kept

ERROR: Final = Metric(
    name="matching_error",
    title="Matching error",
    note="Mean squared distance of the velocity from that of the straight path through the noised candidate.",
)
MOVED: Final = Metric(
    name="moved",
    title="Distance from the behaviour policy",
    note="Mean squared difference of the velocities of the policy and of the one that sampled.",
)
STRAYED: Final = Metric(
    name="kl",
    title="Distance from the start policy",
    note="Mean squared difference of velocities; 0 unless kl_weight is set.",
)


Sharing = Literal["none", "pair", "group"]
"""Candidates that share their noise and its levels."""


class ForwardSettings(ObjectiveSettings):
    """The keys that objectives on the forward process share."""

    draws: int = Field(
        4, ge=1, description="random noise levels per candidate (published: 9 for nft, 6 for awm, 1 for dpo)"
    )
    kl_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the squared distance of velocities from the frozen start policy's; 0 turns it "
        "off (published: 1e-4 for nft, for awm 1e-4 to 3e-3)",
    )


class LaggingSettings(ForwardSettings):
    """The keys of a behaviour policy that follows the policy slowly, of shared noise, and of rewards."""

    reward_clip: float = Field(
        1.0,
        gt=0,
        description="advantages are cut at plus and minus this, and divided by it (published: 5)",
    )
    shared_noise: Sharing = Field(
        "group",
        description="candidates with the same noise at the same levels, so that what noise adds to the "
        "gradient cancels between good and bad ones: all of a prompt, pairs of best and worst, or none "
        "(published: none); a prompt is always trained in one optimizer step",
    )
    behaviour_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="the behaviour policy, which samples, keeps at most this much of itself after a batch; 0 "
        "samples with the policy (published for nft: 0.5, for OCR 0.999)",
    )
    behaviour_ramp: float = Field(
        1e-3,
        gt=0,
        description="growth of that share per optimizer step, from 0 (published: 1e-3, for OCR 7.5e-3)",
    )
    behaviour_hold: int = Field(
        0, ge=0, description="optimizer steps before it grows (published: 0, for OCR 75)"
    )


class ForwardObjective(Objective):
    """An objective whose rows are noised candidates."""

    Settings = ForwardSettings
    settings: ForwardSettings
    sampling = frozenset({"ode", "sde", "cps"})
    metrics: ClassVar[tuple[Metric, ...]] = (ERROR, STRAYED)

    @property
    def keeps(self) -> frozenset[Keep]:
        """Clean latents."""
        return frozenset({"clean"})

    @property
    def needs_reference(self) -> bool:
        """True if the distance from the start policy has a weight."""
        return self.settings.kl_weight > 0

    @property
    def advantage_clip(self) -> float:
        """Advantages are cut at plus and minus this."""
        return math.inf

    def rows(self, rollout: RolloutSettings) -> int:
        """Count a row per draw."""
        return self.settings.draws

    def minibatches(
        self,
        share: Sequence[Assignment],
        trajectories: Mapping[int, Trajectory],
        conditionings: Mapping[int, Conditioning],
        *,
        schedule: Schedule,
        size: int,
    ) -> NoisedTable:
        """Build the noised rows of a share."""
        from learner.noised import noised

        return noised(
            share, trajectories, conditionings, schedule,
            draws=self.settings.draws, size=self.whole(size), advantage_clip=self.advantage_clip,
        )  # fmt: skip


class LaggingObjective(ForwardObjective):
    """An objective that compares the policy with the behaviour policy, which may follow it slowly."""

    Settings = LaggingSettings
    settings: LaggingSettings
    metrics: ClassVar[tuple[Metric, ...]] = (ERROR, MOVED, STRAYED)

    @property
    def advantage_clip(self) -> float:
        """The clip of rewards."""
        return self.settings.reward_clip

    def units(self, kept: Sequence[Kept]) -> Sequence[Unit]:
        """Train the candidates of a prompt in one optimizer step, in sets that share their noise."""
        return [Unit(self._sets(group)) for group in groups(kept)]

    def _sets(self, group: Sequence[int]) -> Sequence[Sequence[int]]:
        if self.settings.shared_noise == "group":
            return [group]
        if self.settings.shared_noise == "none":
            return [(place,) for place in group]
        middle = [(group[len(group) // 2],)] if len(group) % 2 else []
        return [*pairs(group), *middle]

    @property
    def lags(self) -> bool:
        """True if the behaviour policy keeps a part of itself."""
        return self.settings.behaviour_decay > 0

    def behaviour_decay(self, updates: int) -> float:
        """Return the ramp of DiffusionNFT's code, limited by ``behaviour_decay``."""
        settings = self.settings
        grown = settings.behaviour_ramp * max(0, updates - settings.behaviour_hold)
        return min(settings.behaviour_decay, grown)

    def prepared_passes(self, updates: int) -> float:
        """Count a pass for the behaviour policy, unless it is still the policy."""
        return 1.0 if self.lags else 1 - 1 / updates

    def prepared_velocities(self, updates: int) -> float:
        """Count one for each of these passes."""
        return self.prepared_passes(updates)

    def prepared(self, models: Models, shares: Sequence[NoisedTable]) -> Sequence[NoisedTable]:
        """Compute the velocities of the behaviour policy.

        Unless it lags, the first share needs none: its optimizer step starts from the same weights, so `loss`
        has its velocities as well.
        """
        import torch

        fresh, rest = (0 if self.lags else 1), []
        with torch.no_grad():
            for share in shares[fresh:]:
                rest.append(share.with_behaviour([models.policy.velocity(part) for part in share]))
        return [*shares[:fresh], *rest]

    def doubts(self, metrics: Mapping[str, float], *, on_policy: bool) -> str:
        """Report an update in which nothing held the policy back."""
        if metrics["moved"] > 0 or self.settings.kl_weight > 0:
            return ""
        held = self.settings.behaviour_hold
        lag = f"follows it for {held} optimizer steps (behaviour_hold)" if self.lags else "does not lag"
        return (
            f"{self.settings.name}: nothing holds the policy back, since the behaviour policy {lag} and the "
            "batch was one optimizer step; raise learner.updates to 2 or more, with as many prompts of a "
            "margin per step, or set learner.objective.behaviour_decay"
        )


def groups(kept: Sequence[Kept]) -> list[Sequence[int]]:
    """List the places of every group's candidates, worst first."""
    places = range(len(kept))
    found = groupby(places, key=lambda place: kept[place].group_id)
    return [sorted(group, key=lambda place: kept[place].advantage) for _, group in found]


def pairs(group: Sequence[int]) -> list[Sequence[int]]:
    """Pair a group's places, worst first, as best with worst; the middle one of an odd number is left out."""
    return [(group[-1 - i], group[i]) for i in range(len(group) // 2)]


def old_velocity(part: Noised, velocity: Tensor) -> Tensor:
    """Return the velocity of the behaviour policy (N, ...), which is the policy's own if none is known."""
    return part.behaviour if len(part.behaviour) else velocity.detach()


def start_velocity(models: Models, part: Noised) -> Tensor | None:
    """Compute the start policy's velocity (N, ...); None if the loss does not need it."""
    return models.reference.velocity(part) if models.reference else None


def strayed(velocity: Tensor, start: Tensor | None) -> Tensor:
    """Compute the distance from the start policy's velocity per row (N,), 0 where that is not known."""
    return velocity.new_zeros(len(velocity)) if start is None else mean_square(velocity - start)


def mean_square(values: Tensor) -> Tensor:
    """Compute the mean square of every row (N, ...), which is (N,)."""
    return (values**2).flatten(1).mean(1)
