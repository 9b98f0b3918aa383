"""The larger batches for which a plan leaves memory: fixed in a configuration, they keep a run repeatable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cluster.plan.estimate import Batch, Need
from cluster.plan.placement import place

FREE: Final = 0.1
"""Share of a GPU's memory to leave free, as far as plans may be wrong."""
ENOUGH: Final = 1.25
"""Smallest growth of a batch that is worth a word."""


def room(needs: Sequence[Need], batches: Sequence[Batch], memory: float) -> list[str]:
    """Describe how large batches may become, each on its own, on GPUs of ``memory`` bytes."""
    found = (_room(needs, batch, memory) for batch in batches)
    return [line for line in found if line]


def _room(needs: Sequence[Need], batch: Batch, memory: float) -> str:
    """Activations grow with the batch; everything else stays."""
    by_role = {need.role: need for need in needs}
    each = by_role[batch.role].parts.get("activations", 0.0)
    hosts = [gpu for gpu in place(needs).gpus if batch.role in gpu]
    if not each or not hosts:
        return ""
    free = min(
        ((1 - FREE) * memory - sum(count * by_role[role].total for role, count in gpu.items()))
        / gpu[batch.role]
        for gpu in hosts
    )
    most = min(int(batch.size * (1 + free / each)), batch.most)
    return f"{batch.key} up to about {most} (now {batch.size})" if most >= ENOUGH * batch.size else ""
