"""Ulysses sequence parallelism (arXiv 2309.14509): ranks divide the tokens of every row.

Each rank computes its part of the tokens, and within attention its part of the heads. diffusers splits and
gathers, by a plan of each transformer. A rank's gradient is that of its tokens: the sum over ranks is the
whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks import apply_context_parallel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch.distributed.device_mesh import init_device_mesh

if TYPE_CHECKING:
    from rollout.families.diffusers_policy import DiffusersPolicy

KEY: Final = "learner.sequence_parallel"


def check_division(policy: DiffusersPolicy, attention: str | None, ranks: int) -> None:
    """Refuse a model whose heads, or a size whose tokens, that many ranks cannot divide into equal parts.

    Raises:
        ValueError: naming the key, the value and what was expected.
    """
    transformer = policy.transformer
    plan = transformer._cp_plan
    if plan is None:
        raise ValueError(f"{KEY}: got {ranks}, but diffusers cannot divide a {type(transformer).__name__}")
    backend = AttentionBackendName(attention or "native")
    if not _AttentionBackendRegistry._is_context_parallel_available(backend):
        raise ValueError(f"{KEY}: got {ranks}, but not with model.attention = {backend.value!r}")
    counts = {"attention heads": transformer.config.num_attention_heads, "image tokens": policy.tokens}
    if any("encoder_hidden_states" in part for part in plan.values() if isinstance(part, dict)):
        counts["prompt tokens (rollout.text_tokens)"] = policy.text_tokens
    for what, count in counts.items():
        if count % ranks:
            raise ValueError(f"{KEY}: got {ranks}, expected a divisor of the model's {count} {what}")


def divide(transformer: Any, ranks: int, world: int, device: str) -> None:
    """Let every ``ranks`` consecutive ranks of the world compute rows together; a collective operation.

    ``enable_parallelism`` of diffusers does the same, but needs an accelerator.
    """
    names = ("ring", "ulysses")
    mesh = init_device_mesh(device, (world // ranks, 1, ranks), mesh_dim_names=("data", *names))[names]
    ulysses = ContextParallelConfig(ulysses_degree=ranks, mesh=mesh)
    config = ParallelConfig(context_parallel_config=ulysses)
    config.setup(torch.distributed.get_rank(), world, torch.device(device), mesh=mesh)
    for module in transformer.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(transformer, ulysses, transformer._cp_plan)
