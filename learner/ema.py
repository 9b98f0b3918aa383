"""Moving averages of the trained parameters: the one that is evaluated, and the policy that samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from learner import engine
from learner.engine import Masters
from rollout.weights import NamedParameters


class Average:
    """An average of the trained parameters, in float32.

    Each rank averages its own share, so under ZeRO-3 the average is partitioned like the parameters.
    """

    def __init__(self, parameters: NamedParameters, masters: Masters) -> None:
        """Start from the current parameters."""
        self.parameters, self.masters = parameters, masters
        self.shadow = {name: masters.share(p).clone() for name, p in parameters}

    @torch.no_grad()
    def blend(self, decay: float) -> None:
        """Keep ``decay`` of the average, and replace the rest by the current parameters."""
        for name, parameter in self.parameters:
            self.shadow[name].lerp_(self.masters.share(parameter), 1 - decay)

    def whole(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Assemble the average of one parameter, float32; a collective operation."""
        return self.masters.assemble(parameter, self.shadow[name])

    @torch.no_grad()
    def load(self, name: str, parameter: nn.Parameter, values: Tensor) -> None:
        """Set the average of a whole parameter."""
        self.shadow[name].copy_(self.masters.cut(parameter, values.to(self.shadow[name].device)))


class Ema(Average):
    """Flow-GRPO's average, updated every ``every`` optimizer steps with a decay that warms up."""

    def __init__(self, parameters: NamedParameters, masters: Masters, decay: float, every: int) -> None:
        """Start from the current parameters."""
        super().__init__(parameters, masters)
        self.decay, self.every = decay, every

    def step(self, updates: int) -> None:
        """Update the average if ``updates``, the optimizer steps so far, are a multiple of ``every``."""
        if updates % self.every == 0:
            self.blend(min(self.decay, (1 + updates) / (10 + updates)))


class Behaviour(Average):
    """The policy that samples, where it follows the trained one slowly."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the model compute with the behaviour policy's parameters; a collective operation."""
        with engine.replaced(self.parameters, self.masters, self.whole):
            yield
