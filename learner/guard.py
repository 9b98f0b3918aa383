"""Finds gradients that are not finite before any rank applies them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rollout.tensors import NamedParameters


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
