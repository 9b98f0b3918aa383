"""The optimizer that DeepSpeed wraps, and the learning-rate schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from learner.settings import LearnerSettings
from rollout.weights import NamedParameters


class _Holding:
    """An optimizer whose step can be skipped.

    Every stage of ZeRO calls the wrapped optimizer's ``step``, and only some fp16 ones can skip it. So when a
    gradient is not finite, the step is skipped here, on all ranks, and DeepSpeed continues as usual.
    """

    hold = False
    max_norm: float | None = None
    norm: float | None = None

    def step(self, closure: Any = None) -> Any:
        """Apply the gradients unless ``hold`` is set; clip them first if DeepSpeed does not."""
        if self.hold:
            self.norm = None if self.max_norm is None else math.nan
            return None
        if self.max_norm is not None:
            parameters = [p for group in self.param_groups for p in group["params"]]  # type: ignore[attr-defined]
            self.norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_norm))
        return super().step(closure)  # type: ignore[misc]


class HoldingAdamW(_Holding, torch.optim.AdamW):
    """AdamW with float32 moments, from torch itself, so that nothing is compiled at the start.

    On a CPU, also for a GPU's offloaded state, torch's fused step takes a quarter of the time.
    """


def build_optimizer(parameters: NamedParameters, settings: LearnerSettings) -> Any:
    """Build the optimizer of the trained parameters.

    Raises:
        RuntimeError: if the optimizer is the 8-bit one and bitsandbytes is not installed.
    """
    on_cpu = settings.offload != "none" or not parameters[0][1].is_cuda
    optimizer = _class_of(settings, fused=on_cpu)(
        [p for _, p in parameters],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    if settings.zero_stage == 0:
        optimizer.max_norm = settings.max_grad_norm
    return optimizer


def _class_of(settings: LearnerSettings, *, fused: bool) -> Any:
    if settings.optimizer == "adamw":
        return partial(HoldingAdamW, fused=fused or None)  # None lets torch choose
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise RuntimeError("learner.optimizer 'adamw8bit' needs the package bitsandbytes") from error
    return type("HoldingAdamW8bit", (_Holding, AdamW8bit), {})


class LearningRateSchedule:
    """The learning rate's factor: a linear warm-up, then constant, linear or cosine down to 0 at the end."""

    def __init__(self, kind: str, warmup: int, total: int) -> None:
        """Set the kind, and ``warmup`` and ``total`` in optimizer steps; a warm-up of 0 starts at 1."""
        self.kind, self.warmup, self.total = kind, warmup, total

    def __call__(self, step: int) -> float:
        """Compute the factor at an optimizer step, counted from zero."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        if self.kind == "linear":
            return 1 - done
        return 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1.0
