"""Online Diffusion-DPO (arXiv 2311.12908) on the kept pairs: the best against the worst, the next ones, ...

With the matching errors e of the policy and e_ref of the frozen start policy, both at the same noise, the
loss of a pair is -log sigmoid(-(b / 2) ((e - e_ref) of the better one - (e - e_ref) of the worse one)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from learner.objectives.base import CHOICES, Metric, Models, Terms
from learner.objectives.forward_process import (
    ForwardObjective,
    ForwardSettings,
    groups,
    mean_square,
    pairs,
    strayed,
)
from learner.records import Unit

if TYPE_CHECKING:
    from learner.noised import Noised
    from selection.records import Kept


class DPOSettings(ForwardSettings):
    """The keys of ``dpo``."""

    name: Literal["dpo"] = Field("dpo", description=CHOICES)
    preference_scale: float = Field(
        100.0,
        gt=0,
        description="b, by which differences of errors become log-odds: the larger, the closer to the start "
        "policy (published: 100 by Flow-GRPO's code, 2000 to 5000 for Diffusion-DPO)",
    )


class DPO(ForwardObjective):
    """The objective that prefers the better candidate of every pair."""

    Settings = DPOSettings
    settings: DPOSettings
    metrics: ClassVar[tuple[Metric, ...]] = (
        *ForwardObjective.metrics,
        Metric(
            name="preferred",
            title="Pairs in the right order",
            note="Share of pairs whose better candidate gained more than the worse one since the start.",
        ),
        Metric(name="preference", title="Log-odds of pairs", note="Mean of b / 2 times the difference."),
    )

    @property
    def needs_reference(self) -> bool:
        """Always true: preferences are relative to the start policy."""
        return True

    def units(self, kept: Sequence[Kept]) -> Sequence[Unit]:
        """Pair the candidates of every group, best with worst, and leave out pairs that tie.

        Raises:
            ValueError: if no pair is left.
        """
        every = [pair for group in groups(kept) for pair in pairs(group)]
        units = [Unit([(a, b)], whole=True) for a, b in every if kept[a].advantage > kept[b].advantage]
        if not units:
            raise ValueError(
                f"dpo: none of the {len(kept)} kept candidates has a partner of another reward; keep two or "
                "more per prompt, and let selection.ties be drop"
            )
        return units

    def whole(self, size: int) -> int:
        """Round to whole pairs, whose two candidates have a row per draw."""
        pair = 2 * self.settings.draws
        return max(1, size // pair) * pair

    def loss(self, models: Models, part: Noised) -> Terms:
        """Compute the loss of every pair, which both of its candidates' rows have."""
        from torch.nn.functional import logsigmoid

        assert models.reference is not None
        start = models.reference.velocity(part)
        velocity = models.policy.velocity(part)
        error = mean_square(velocity - part.target)
        gain = (mean_square(start - part.target) - error).view(-1, 2, self.settings.draws)
        odds = self.settings.preference_scale / 2 * (gain[:, :1] - gain[:, 1:])
        odds = odds.expand_as(gain).flatten()
        distance = strayed(velocity, start)
        return Terms(
            losses=-logsigmoid(odds) + self.settings.kl_weight * distance,
            prediction=velocity,
            metrics={
                "matching_error": error,
                "kl": distance,
                "preferred": odds > 0,
                "preference": odds,
            },
        )
