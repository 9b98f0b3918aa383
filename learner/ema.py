"""An exponential moving average of the trained parameters, in float32, counted in optimizer steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learner.engine import Masters
from rollout.weights import NamedParameters


class Ema:
    """Flow-GRPO's average, updated every ``every`` optimizer steps with a decay that warms up.

    Each rank averages its own share, so under ZeRO-3 the average is partitioned like the parameters.
    """

    def __init__(self, parameters: NamedParameters, masters: Masters, decay: float, every: int) -> None:
        """Start from the current parameters."""
        self.parameters, self.masters = parameters, masters
        self.decay, self.every = decay, every
        self.shadow = {name: masters.share(p).clone() for name, p in parameters}

    @torch.no_grad()
    def step(self, updates: int) -> None:
        """Update the average if ``updates``, the optimizer steps so far, are a multiple of ``every``."""
        if updates % self.every:
            return
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for name, parameter in self.parameters:
            self.shadow[name].lerp_(self.masters.share(parameter), 1 - decay)

    def whole(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Assemble the average of one parameter, float32; a collective operation."""
        return self.masters.assemble(parameter, self.shadow[name])

    @torch.no_grad()
    def load(self, name: str, parameter: nn.Parameter, values: Tensor) -> None:
        """Set the average of a whole parameter."""
        self.shadow[name].copy_(self.masters.cut(parameter, values.to(self.shadow[name].device)))
