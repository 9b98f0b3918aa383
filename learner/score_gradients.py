"""Score gradients of single trajectories, as seeded random projections of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.minibatch import transitions
from learner.objectives.flow_grpo import clipped_surrogate
from learner.predictor import Predictor
from learner.rank_shares import Assignment
from rollout.records import Conditioning, Trajectory
from rollout.sde import log_prob
from rollout.settings import RolloutSettings
from rollout.weights import NamedParameters


class RandomProjection:
    """A random projection to ``width`` numbers: each coordinate is added, with a random sign, to one of them.

    Inner products are kept on average, with an error of about 1 / sqrt(width) of the product of the lengths
    (count sketch; Charikar et al. 2002). It needs nine bytes per parameter, for any width.
    """

    def __init__(self, parameters: NamedParameters, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parameters, self.width = [parameter for _, parameter in parameters], width
        self.places = [self._draw(width, p, generator) for p in self.parameters]
        self.signs = [self._draw(2, p, generator).to(torch.int8) * 2 - 1 for p in self.parameters]

    def gradient(self) -> NDArray[np.float32]:
        """Project the parameters' gradients to (width,); a parameter without a gradient counts as zero."""
        found = torch.zeros(self.width, device=self.parameters[0].device)
        for parameter, places, signs in zip(self.parameters, self.places, self.signs, strict=True):
            if parameter.grad is not None:
                found.index_add_(0, places, parameter.grad.flatten().float() * signs)
        return found.cpu().numpy()

    @staticmethod
    def _draw(limit: int, parameter: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(limit, (parameter.numel(),), generator=generator).to(parameter.device)


class ScoreGradients:
    """Gradients of the log-probability of sampled trajectories under the policy that sampled them.

    ``policy`` is that of a sampler; its ``parameters`` require gradients only during `compute`.
    """

    def __init__(
        self, policy: Any, rollout: RolloutSettings, parameters: NamedParameters, width: int, seed: int
    ) -> None:
        self.policy, self.rollout, self.parameters = policy, rollout, parameters
        self.projection = RandomProjection(parameters, width, seed)
        self.predictor = Predictor(policy, rollout, partial(nullcontext, policy.transformer))

    def compute(self, conditioning: Conditioning, trajectories: Sequence[Trajectory]) -> NDArray[np.float32]:
        """Compute the gradient of each trajectory's mean log-probability over steps, projected: (n, width).

        The trajectories are of one prompt. A gradient times the advantage is the trajectory's contribution to
        FlowGRPO's ascent direction while on-policy.
        """
        for _, parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            return np.stack([self._gradient(conditioning, one) for one in trajectories])
        finally:
            for _, parameter in self.parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _gradient(self, conditioning: Conditioning, trajectory: Trajectory) -> NDArray[np.float32]:
        device = str(self.parameters[0][1].device)
        alone = Assignment(trajectory=0, group_id=0, seed=0, advantage=1.0, weight=1.0)
        schedule = self.policy.schedule(self.rollout.steps).to(device)
        size = len(trajectory.steps)
        (rows,) = transitions([alone], {0: trajectory}, {0: conditioning}, schedule, size=size)
        move = self.predictor.transition(rows)
        log_ratio = log_prob(rows.next_states, move) - rows.log_probs
        # The ratio is 1, far from the clip range, since this policy sampled: minus the loss is the score.
        surrogate, _ = clipped_surrogate(log_ratio, rows.advantages, clip=0.5)
        for _, parameter in self.parameters:
            parameter.grad = None
        (-(rows.weights * surrogate).sum()).backward()
        return self.projection.gradient()
