"""The interface through which objectives call a policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from learner.minibatch import Transitions
from learner.noised import Noised
from rollout.sampler import transition
from rollout.sde import Transition
from rollout.settings import RolloutSettings


class Predictor:
    """A policy whose transformer is run by an engine, or is a frozen copy."""

    def __init__(
        self, policy: Any, rollout: RolloutSettings, running: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Set the model family's policy, and a function whose context yields the transformer to call."""
        self.policy, self.rollout, self.running = policy, rollout, running

    def transition(self, part: Transitions) -> Transition:
        """Compute the distribution over the next state of every row."""
        with self.running() as model:
            return transition(
                self.policy, self.rollout, model, part.states, part.conditioning,
                (part.sigmas, part.next_sigmas), part.timesteps,
            )  # fmt: skip

    def velocity(self, part: Noised) -> Tensor:
        """Compute the velocity (N, ...) at the state of every row."""
        with self.running() as model:
            found: Tensor = self.policy.velocity(model, part.states, part.timesteps, part.conditioning)
            return found
