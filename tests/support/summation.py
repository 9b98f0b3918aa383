"""Sums that depend on the shape of a batch, as a GPU's do, on a CPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rollout.families.registry import load_policy


@lru_cache(maxsize=256)
def _order(features: int, rows: int) -> Tensor:
    return torch.randperm(features, generator=torch.Generator().manual_seed(1000 * features + rows))


def depend_on_shape(module: nn.Module) -> None:
    """Let linear layers compute with another kernel for another number of rows; exact numbers would agree.

    The order of the sums differs with every number of rows; for odd ones the bias is added after rounding.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.__class__ = _reordered(type(layer))


def load_rounding_policy(*arguments: Any, **options: Any) -> Any:
    """Load a policy as `load_policy` does, whose transformer's sums depend on the shape of a batch."""
    policy = load_policy(*arguments, **options)
    depend_on_shape(policy.transformer)
    return policy


@lru_cache
def _reordered(kind: Any) -> Any:
    class Reordered(kind):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            order = _order(self.in_features, len(x))
            weight = self.weight if torch.is_autocast_enabled(x.device.type) else self.weight.to(x.dtype)
            bias = self.bias if self.bias is None else self.bias.to(weight.dtype)
            if len(x) % 2 == 0 or bias is None:
                return linear(x[..., order], weight[:, order], bias)
            found = linear(x[..., order], weight[:, order])
            return found + bias.to(found.dtype)

    return Reordered
