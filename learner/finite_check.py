"""Detection of non-finite gradients, before any rank applies them, and of non-finite weights."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rollout.weights import NamedParameters


@torch.no_grad()
def not_finite(parameters: NamedParameters, rank: int) -> tuple[str, ...]:
    """Name the parameters that have a non-finite value on this rank.

    This costs one pass over the weights and one synchronisation with the device. Of a parameter that ZeRO-3
    has partitioned, every rank checks its own part.
    """
    finite = torch.stack([_held(p, rank).isfinite().all() for _, p in parameters]).tolist()
    return tuple(name for (name, _), good in zip(parameters, finite, strict=True) if not good)


def _held(parameter: Any, rank: int) -> Tensor:
    """Return a rank's part of a parameter, without the padding of the last part, which is uninitialised."""
    if not hasattr(parameter, "ds_tensor"):
        return cast(Tensor, parameter)
    part: Tensor = parameter.ds_tensor.flatten()
    return part[: max(0, parameter.ds_numel - rank * len(part))]


class FiniteCheck:
    """A check of every gradient of this rank as it is computed, before ZeRO reduces and scatters it."""

    def __init__(self, parameters: NamedParameters, device: str) -> None:
        """Register hooks on the parameters; one addition per gradient, without synchronising the device."""
        self.sum = torch.zeros((), device=device)
        for _, parameter in parameters:
            parameter.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        # Adds zero, or NaN if any value is not finite.
        self.sum += gradient.detach().sum(dtype=torch.float32) * 0

    def failed(self) -> bool:
        """Return True if a gradient of any rank since the last call was not finite; collective."""
        bad = (~self.sum.isfinite()).float()
        self.sum.zero_()
        if dist.get_world_size() > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return bool(bad)
