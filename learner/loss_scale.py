"""The scale of a loss whose gradient passes through float16."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor

from rollout.weights import NamedParameters

LOWERED_BY: Final = 4
"""Bits by which an overflow lowers the scale: a few skipped steps find any scale that works."""
RAISED_AFTER: Final = 200
"""Optimizer steps without an overflow after which the scale is raised by a bit again."""


class LossScale:
    """A factor of the loss that is removed from the parameters' gradients as soon as they are computed.

    The gradient of a loss that is a mean over D dimensions, with weight w, is about w / D in each: 1e-9 for
    images of 512 pixels, where float16 has nothing between 0 and 6e-8. Scaled by D / w it is about 1. The
    factor is a power of two, so it changes no digit of a gradient that fits. If one overflows all the same,
    the step is skipped and the next ones are scaled less.
    """

    def __init__(self, parameters: NamedParameters, dtype: str) -> None:
        """Register hooks on the parameters, which are float32; outside float16 do nothing."""
        self.active = dtype == "float16"
        self.value = 1.0
        self.lowered = self.steps = 0
        if self.active:
            for _, parameter in parameters:
                parameter.register_hook(self._remove)

    def set(self, numel: int, weight: float) -> float:
        """Set and return the factor for rows of ``numel`` dimensions, the largest of that weight."""
        if self.active:
            self.value = 2.0 ** (round(math.log2(numel / (weight or 1.0))) - self.lowered)
        return self.value

    def record(self, *, overflowed: bool) -> None:
        """Adapt the scale to the outcome of an optimizer step."""
        if overflowed:
            self.lowered, self.steps = self.lowered + LOWERED_BY, 0
            return
        self.steps += 1
        if self.lowered and self.steps == RAISED_AFTER:
            self.lowered, self.steps = self.lowered - 1, 0

    def _remove(self, gradient: Tensor) -> Tensor:
        return gradient / self.value
