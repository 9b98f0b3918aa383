"""Finds gradients that are not finite before any rank applies them, and weights that no longer are."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rollout.weights import NamedParameters


@torch.no_grad()
def not_finite(parameters: NamedParameters, rank: int) -> tuple[str, ...]:
    """The names of parameters of which this rank holds a value that is not finite.

    One pass over the weights and one wait for the device. Of a parameter that ZeRO-3 has partitioned, every
    rank sees its own part.
    """
    finite = torch.stack([_held(p, rank).isfinite().all() for _, p in parameters]).tolist()
    return tuple(name for (name, _), good in zip(parameters, finite, strict=True) if not good)


def _held(parameter: Any, rank: int) -> Tensor:
    """What a rank holds of a parameter, without the padding of a last part, which is never written."""
    if not hasattr(parameter, "ds_tensor"):
        return cast(Tensor, parameter)
    part: Tensor = parameter.ds_tensor.flatten()
    return part[: max(0, parameter.ds_numel - rank * len(part))]


class GradientGuard:
    """Watches every gradient of this rank as it is computed, before ZeRO reduces and scatters it."""

    def __init__(self, parameters: NamedParameters, device: str) -> None:
        """Watch the parameters; one addition per gradient, and no wait for the device."""
        self.poison = torch.zeros((), device=device)
        for _, parameter in parameters:
            parameter.register_hook(self._watch)

    def _watch(self, gradient: Tensor) -> None:
        # Zero, or NaN when anything in it is not finite.
        self.poison += gradient.detach().sum(dtype=torch.float32) * 0

    def tripped(self) -> bool:
        """Whether any rank's gradient since the last call was not finite; collective."""
        bad = (~self.poison.isfinite()).float()
        self.poison.zero_()
        if dist.get_world_size() > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return bool(bad)
