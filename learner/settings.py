"""What a user sets about the update; light enough for the driver to import."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rollout.settings import Settings


class LearnerSettings(Settings):
    """How FlowGRPO updates the policy."""

    ranks: int = Field(1, ge=1, description="data-parallel DeepSpeed ranks")
    gpus: float = Field(1, ge=0, description="GPUs per rank; 0 trains on the CPU over gloo")
    threads: int = Field(1, ge=1, description="CPU threads per rank")
    learning_rate: float = Field(3e-4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's moment decays")
    warmup: int = Field(0, ge=0, description="optimizer steps of linear learning-rate warm-up")
    updates: int = Field(2, ge=1, description="optimizer steps per batch of groups")
    micro_batch: int = Field(8, ge=1, description="(trajectory, step) pairs per forward pass")
    clip: float = Field(1e-4, gt=0, description="clip range of the ratio")
    advantage_clip: float = Field(5.0, gt=0, description="advantages are cut at plus and minus this")
    beta: float = Field(0.0, ge=0, description="weight of the KL to the frozen start policy; 0 turns it off")
    kl: Literal["gaussian", "flow_grpo"] = Field(
        "gaussian", description="gaussian divides by 2 std^2; flow_grpo by 2 s^2, without the step size"
    )
    max_grad_norm: float = Field(1.0, gt=0)
    zero_stage: Literal[1, 2] = Field(1, description="DeepSpeed ZeRO stage")
    gradient_checkpointing: bool = False
    ema_decay: float = Field(0.9, ge=0, lt=1, description="decay of the averaged weights")
    ema_every: int = Field(8, ge=1, description="optimizer steps between two averagings")
