"""The settings of the learner; light enough for the driver to import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, field_validator, model_validator

from learner.objectives.flow_grpo import FlowGRPOSettings
from learner.objectives.registry import AnyObjective, objective_settings
from rollout.settings import Settings

FORWARD_TOKENS: Final = 8192
"""Image tokens in a forward pass of the learner, unless ``micro_batch`` is set."""


class LearnerSettings(Settings):
    """Updates of the policy by an objective."""

    moved: ClassVar[Mapping[str, str]] = {
        key: f"objective.{key}" for key in ("clip", "ratio", "advantage_clip", "beta", "kl")
    }

    ranks: int = Field(1, ge=1, description="data-parallel DeepSpeed ranks")
    sequence_parallel: int = Field(
        1, ge=1, description="consecutive ranks that divide the tokens of each candidate (Ulysses)"
    )
    gpus: float = Field(1, ge=0, description="GPUs per rank; 0 trains on the CPU over gloo")
    threads: int = Field(1, ge=1, description="CPU threads per rank")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit keeps its moments in 8 bits; needs a GPU and bitsandbytes"
    )
    learning_rate: float = Field(3e-4, gt=0, description="learning rate after the warm-up")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of AdamW's two moments")
    warmup: int = Field(0, ge=0, description="optimizer steps of linear learning-rate warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up; linear and cosine end at 0 with the run"
    )
    updates: int = Field(2, ge=1, description="optimizer steps per batch of groups")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="rows per forward pass, which are (trajectory, step) pairs, or for nft, awm and dpo "
        "(candidate, noise level) ones; dpo keeps the two of a pair together; default: 8192 image tokens' "
        "worth",
    )
    objective: AnyObjective = Field(
        default_factory=FlowGRPOSettings, description="objective that an update minimises, with its own keys"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="norm to which the gradient of an update is clipped")
    max_skipped: int = Field(
        4, ge=1, description="optimizer steps in a row skipped as non-finite before stopping"
    )
    zero_stage: int = Field(1, ge=0, le=3, description="DeepSpeed ZeRO stage")
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="keep on the CPU: the optimizer's state, or with ZeRO 3 the parameters as well"
    )
    deepspeed: Path | None = Field(None, description="DeepSpeed JSON file for options that have no key here")
    gradient_checkpointing: bool = Field(
        False, description="keep no activations and compute them again: less memory, about a third more time"
    )
    ema_decay: float = Field(0.9, ge=0, lt=1, description="decay of the averaged weights")
    ema_every: int = Field(8, ge=1, description="optimizer steps between two averagings")
    bucket_mb: float = Field(
        128, gt=0, description="size in MB of the parts in which weights are sent to the samplers"
    )

    @property
    def shares(self) -> int:
        """Count the shares into which ranks divide an update's candidates."""
        return self.ranks // self.sequence_parallel

    def pairs(self, tokens: int) -> int:
        """Count the (trajectory, step) pairs of a forward pass, for candidates with that many image tokens.

        8192 tokens are 8 pairs of a model with 1024 tokens at 512 px, which may fit on a GPU of 24 GB; they
        do not keep a larger one busy. This is a fixed rule, not a measurement, so that a run can be repeated
        bit for bit.
        """
        return self.micro_batch or max(1, FORWARD_TOKENS // tokens)

    @field_validator("objective", mode="before")
    @classmethod
    def _by_name(cls, values: Any) -> Any:
        return objective_settings(values)

    @model_validator(mode="after")
    def _fits_together(self) -> LearnerSettings:
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload = 'optimizer' needs zero_stage 1, 2 or 3, got 0")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError(f"offload = 'parameters' needs zero_stage 3, got {self.zero_stage}")
        if self.ranks % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel must divide ranks, {self.ranks}, got {self.sequence_parallel}"
            )
        if self.ranks > 1 and 0 < self.gpus <= 0.5:
            raise ValueError(
                f"gpus must be above 0.5 with {self.ranks} ranks, got {self.gpus:g}: else two share a GPU, "
                "which NCCL refuses; give samplers and rewards what is left of each"
            )
        if self.optimizer == "adamw8bit" and (self.gpus == 0 or self.offload != "none"):
            raise ValueError("optimizer 'adamw8bit' works on GPUs only: set gpus and leave offload out")
        return self
