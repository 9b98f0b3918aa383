"""An exponential moving average of the trained parameters, in float32, counted in optimizer steps."""

from __future__ import annotations

import torch
from torch import Tensor

from rollout.tensors import NamedParameters


class Ema:
    """Flow-GRPO's average: every ``every`` optimizer steps, with a decay that warms up."""

    def __init__(self, parameters: NamedParameters, decay: float, every: int) -> None:
        """Start from the parameters as they are."""
        self.parameters = parameters
        self.decay, self.every = decay, every
        self.shadow = [p.detach().float().clone() for _, p in parameters]

    @torch.no_grad()
    def step(self, updates: int) -> None:
        """Average once if ``updates``, the number of optimizer steps so far, is a multiple of ``every``."""
        if updates % self.every:
            return
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for average, (_, parameter) in zip(self.shadow, self.parameters, strict=True):
            average.lerp_(parameter.detach().float(), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return {name: t for (name, _), t in zip(self.parameters, self.shadow, strict=True)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take over averages saved by `state`."""
        for (name, _), average in zip(self.parameters, self.shadow, strict=True):
            average.copy_(state[name])
