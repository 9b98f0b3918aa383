"""What a user may set about selection; light enough for the driver (pydantic only)."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

StrategyName = Literal["all", "random", "noise_margin", "max_variance", "global_margin", "prompt_filter"]
"""The names of `selection.strategies.STRATEGIES`."""

Normalisation = Literal["candidates", "selected", "batch"]
"""The normalisations of `selection.advantages.advantages`."""

Margin = Literal["total", "each"]
"""What margins are taken on: the total, or every weighted reward in turn."""

PAIR_STRATEGIES: Final[frozenset[StrategyName]] = frozenset({"noise_margin", "global_margin"})
"""Strategies that keep pairs, and so an even number."""


class SelectionSettings(BaseModel):
    """The ``selection`` section of the configuration.

    Of ``candidates`` per prompt, ``keep`` are trained on, chosen by ``strategy`` (``all`` ignores ``keep``;
    ``global_margin`` and ``prompt_filter`` keep that many on average). ``advantages`` says whose statistics
    normalise; ``rms_match`` gives advantages the size that training on every candidate would have;
    ``tolerance`` is the margin, in units of the reward, at or below which two candidates count as equal.
    ``margin = "each"`` (with ``noise_margin``) shares the kept pairs among the weighted rewards: each in turn
    takes the widest pair that is left, so that the reward with the widest scale does not choose all of them.
    With ``previews``, that many candidates are begun and scored by a preview, and the ``candidates`` among
    them that promise the widest margins are finished.
    Raises ``ValidationError`` (a ``ValueError``) naming the key, the value and what was expected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    previews: int = Field(default=0, ge=0)
    candidates: int = Field(default=16, ge=2)
    keep: int = Field(default=8, ge=2)
    strategy: StrategyName = "noise_margin"
    advantages: Normalisation = "batch"
    rms_match: bool = False
    tolerance: float = Field(default=1e-6, ge=0.0, allow_inf_nan=False)
    margin: Margin = "total"

    @model_validator(mode="after")
    def _keep_fits(self) -> SelectionSettings:
        if self.keep > self.candidates:
            raise ValueError(
                f"selection.keep must be at most selection.candidates ({self.candidates}), got {self.keep}"
            )
        if 0 < self.previews <= self.candidates:
            raise ValueError(
                f"selection.previews must be more than selection.candidates ({self.candidates}), "
                f"or 0 for none, got {self.previews}"
            )
        if self.strategy in PAIR_STRATEGIES and self.keep % 2:
            raise ValueError(
                f"selection.keep must be even, since {self.strategy} keeps pairs, got {self.keep}"
            )
        if self.margin == "each" and self.strategy != "noise_margin":
            raise ValueError(f"selection.margin 'each' needs strategy noise_margin, got {self.strategy}")
        return self
