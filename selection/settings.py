"""The settings of selection; light enough for the driver to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final, Literal, get_args

from pydantic import Field, field_validator, model_validator

from rollout.settings import Settings

StrategyName = Literal["all", "random", "noise_margin", "max_variance", "global_margin", "prompt_filter"]
"""The names of `selection.strategies.STRATEGIES`."""

Normalisation = Literal["candidates", "selected", "batch", "ranks"]
"""The normalisations of `selection.advantages.advantages`."""

Margin = Literal["total", "each"]
"""The reward of the margins: the total, or every weighted reward in turn."""

PAIR_STRATEGIES: Final[frozenset[StrategyName]] = frozenset({"noise_margin", "global_margin"})
"""Strategies that keep pairs, and so an even number."""


class SelectionSettings(Settings):
    """Selection of the candidates to train on among those sampled.

    ``global_margin`` and ``prompt_filter`` keep ``keep`` candidates per prompt on average.
    """

    moved: ClassVar[Mapping[str, str]] = {"previews": "drafts"}

    drafts: int = Field(
        0,
        ge=0,
        description="candidates drafted and scored per prompt, of which those that promise the widest "
        "margins are sampled in full; 0 turns drafts off",
    )
    candidates: int = Field(16, ge=2, description="candidates sampled per prompt, each from its own noise")
    adaptive: int = Field(
        0,
        ge=0,
        description="candidates that every prompt draws first; the half of the prompts whose margins are "
        "then narrowest draws the others of the step, candidates per prompt on average; 0: all draw as many",
    )
    keep: int = Field(8, ge=2, description="candidates per prompt to train on; the strategy all ignores it")
    strategy: str = Field(
        "noise_margin",
        description="noise_margin keeps the widest pairs of every prompt, global_margin of the whole batch, "
        "max_variance the subset that varies most, prompt_filter whole prompts; random and all are the "
        "controls, and module:function is a strategy of your own",
    )
    advantages: Normalisation = Field(
        "batch",
        description="rewards whose mean and spread normalise advantages: those of all candidates of the "
        "prompt, of the selected ones, or (for the spread) of the whole batch; ranks instead counts the "
        "prompt's candidates that are worse, less those that are better, from -1 to 1",
    )
    rms_match: bool = Field(
        False, description="scale advantages to the root mean square of training on every candidate"
    )
    tolerance: float = Field(
        1e-6, ge=0, description="margin, in units of the reward, at or below which two candidates tie"
    )
    ties: Literal["drop", "keep"] = Field(
        "drop",
        description="prompts whose kept candidates all tie teach nothing, and dilute the others' gradient: "
        "leave them out, as FlowGRPO does, or train on them",
    )
    margin: Margin = Field(
        "total",
        description="reward that noise_margin compares: the total, or every weighted one in turn, so that "
        "the one with the largest scale does not choose all pairs",
    )

    @field_validator("strategy")
    @classmethod
    def _known(cls, name: str) -> str:
        known = get_args(StrategyName)
        if name not in known and ":" not in name:
            raise ValueError(f"expected one of {', '.join(map(repr, known))}, or module:function")
        return name

    @model_validator(mode="after")
    def _keep_fits(self) -> SelectionSettings:
        if self.keep > self.candidates:
            raise ValueError(
                f"selection.keep must be at most selection.candidates ({self.candidates}), got {self.keep}"
            )
        if 0 < self.drafts <= self.candidates:
            raise ValueError(
                f"selection.drafts must be more than selection.candidates ({self.candidates}), "
                f"or 0 to turn them off, got {self.drafts}"
            )
        if self.adaptive and not 2 <= self.adaptive < self.candidates:
            raise ValueError(
                "selection.adaptive must be from 2 to less than selection.candidates "
                f"({self.candidates}), or 0 to turn it off, got {self.adaptive}"
            )
        if self.adaptive and self.drafts:
            raise ValueError(
                f"selection.adaptive ({self.adaptive}) and selection.drafts ({self.drafts}): expected one of "
                "them to be 0"
            )
        if self.strategy in PAIR_STRATEGIES and self.keep % 2:
            raise ValueError(
                f"selection.keep must be even, since {self.strategy} keeps pairs, got {self.keep}"
            )
        if self.margin == "each" and self.strategy != "noise_margin":
            raise ValueError(f"selection.margin 'each' needs strategy noise_margin, got {self.strategy}")
        return self
