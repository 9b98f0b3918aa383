"""A policy as an objective calls it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from learner.minibatch import Transitions
from rollout.sampler import transition
from rollout.sde import Transition
from rollout.settings import RolloutSettings


class Predictor:
    """Calls a model family's transformer, whoever runs it: an engine, or a frozen copy."""

    def __init__(
        self, policy: Any, rollout: RolloutSettings, running: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Take the family's adapter, and a context that yields the transformer to call."""
        self.policy, self.rollout, self.running = policy, rollout, running

    def transition(self, part: Transitions) -> Transition:
        """Compute the distribution over the next state of every row."""
        with self.running() as model:
            return transition(
                self.policy, self.rollout, model, part.states, part.conditioning,
                (part.sigmas, part.next_sigmas), part.timesteps,
            )  # fmt: skip
