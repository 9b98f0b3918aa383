"""The cost of oversampling: prompts, candidates and kept per step, from a baseline and a factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BudgetMode = Literal["fixed_train", "fixed_rollout"]
"""The number that stays as in the baseline: samples trained on, or samples made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The samples of a step: ``groups`` prompts of ``candidates`` each, of which ``keep`` are trained on."""

    groups: int
    candidates: int
    keep: int

    @property
    def sampled(self) -> int:
        """Candidates sampled per step."""
        return self.groups * self.candidates

    @property
    def trained(self) -> int:
        """Candidates trained on per step (at most: fewer where candidates tie or fail)."""
        return self.groups * self.keep


def plan_budget(
    mode: BudgetMode, *, groups: int, candidates: int, oversample: int, keep: int | None = None
) -> Budget:
    """Compute the budget of a baseline of ``groups`` x ``candidates`` after oversampling by a whole factor.

    - ``fixed_train``: as many prompts, ``oversample`` times the candidates, as many kept as the baseline
      has candidates. Sampling costs ``oversample`` times as much, training the same.
    - ``fixed_rollout``: ``oversample`` times fewer prompts with ``oversample`` times the candidates, so as
      many samples; ``keep`` of each (the baseline's candidates if not given), so at most the same training.

    Raises:
        ValueError: with the arithmetic, if the numbers do not fit.
    """
    keep = candidates if keep is None else keep
    total = oversample * candidates
    if groups < 1 or candidates < 2 or oversample < 1:
        raise ValueError(
            "a budget needs groups >= 1, candidates >= 2 and oversample >= 1, "
            f"got {groups}, {candidates} and {oversample}"
        )
    if not 2 <= keep <= total:
        raise ValueError(
            f"keep must be from 2 to {oversample} x {candidates} = {total} candidates, got {keep}"
        )
    if mode == "fixed_train":
        if keep != candidates:
            raise ValueError(
                f"fixed_train keeps the baseline's {candidates} candidates per prompt, got {keep}"
            )
        return Budget(groups=groups, candidates=total, keep=keep)
    if groups % oversample:
        raise ValueError(
            f"fixed_rollout needs prompts that divide by the factor: {groups} / {oversample} is not whole"
        )
    return Budget(groups=groups // oversample, candidates=total, keep=keep)
