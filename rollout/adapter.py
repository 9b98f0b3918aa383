"""Which parameters are trained: a LoRA adapter (through diffusers and peft), or all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig

from rollout.settings import ModelSettings


def prepare(transformer: Any, model: ModelSettings, targets: Sequence[str], seed: int) -> Any:
    """Freeze what is not trained; the adapter's random half comes from the seed, the same everywhere."""
    transformer.requires_grad_(model.lora_rank == 0)
    if model.lora_rank:
        torch.manual_seed(seed)
        config = LoraConfig(
            r=model.lora_rank,
            lora_alpha=model.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=list(model.lora_targets or targets),
        )
        transformer.add_adapter(config)
    return transformer


@contextmanager
def adapter_off(transformer: Any) -> Iterator[None]:
    """The frozen base model, for the reference of the KL term."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
