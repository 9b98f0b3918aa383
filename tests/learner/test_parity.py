"""Flow-GRPO's formulas, derived again from its paper and code in float64 and scalars, against ours.

Its soft score of GenEval's objects is in tests/rewards/scorers/test_geneval_flow_grpo.py, a whole update in
test_worker.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from learner.ema import Ema
from learner.engine import Masters
from learner.minibatch import Transitions
from learner.objectives.base import Models
from learner.objectives.flow_grpo import FlowGRPO, FlowGRPOSettings
from rewards.combine import Scores
from rollout.sampler import stochastic
from rollout.sde import log_prob
from rollout.settings import RolloutSettings
from selection.selector import Selector
from selection.settings import SelectionSettings

SHAPE = (4, 6, 6)
SIZE = math.prod(SHAPE)
SIGMAS = (1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089)
"""SD3's schedule of 10 steps with shift 3, without its last level, 0."""
Floats = NDArray[np.float64]


@dataclass
class Step:
    """A step in float64: its coefficients of x and v in the mean, and its std."""

    of_x: float
    of_v: float
    std: float


def derive(dynamics: str, sigma: float, nxt: float, level: float) -> Step:
    """The coefficients of a step: the reverse SDE by Euler-Maruyama, or coefficient-preserving sampling."""
    if dynamics == "cps":
        std = nxt * math.sin(level * math.pi / 2)
        kept = math.sqrt(nxt**2 - std**2)
        return Step((1 - nxt) + kept, -sigma * (1 - nxt) + kept * (1 - sigma), std)
    s = level * math.sqrt(sigma / (1 - (nxt if sigma == 1 else sigma)))
    dt = nxt - sigma
    return Step(
        1 + s * s / (2 * sigma) * dt, (1 + s * s * (1 - sigma) / (2 * sigma)) * dt, s * math.sqrt(-dt)
    )


def log_density(x: Floats, mean: Floats, std: float, *, unscaled: bool) -> float:
    distance = float(np.mean((x - mean) ** 2))
    return (
        -distance if unscaled else -distance / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    )


@dataclass
class Row:
    """A row of a mini-batch in float64, and the policy that moved since it was sampled."""

    x: Floats
    x_next: Floats
    v: Floats
    v_ref: Floats
    old: float
    advantage: float
    step: int


def rows(dynamics: str, unscaled: bool, seed: int, moved: float) -> list[Row]:
    """One row per trained step, sampled by a policy that has moved by ``moved`` times a random direction."""
    random, found = np.random.default_rng(seed), []
    for step, (sigma, nxt) in enumerate(pairwise(SIGMAS)):
        x, v, noise, direction, apart = random.normal(size=(5, *SHAPE))
        made = derive(dynamics, sigma, nxt, 0.7)
        mean = made.of_x * x + made.of_v * v
        x_next = mean + made.std * noise
        old = log_density(x_next, mean, made.std, unscaled=unscaled)
        advantage = (-1) ** step * (0.3 + 0.2 * step)
        found.append(Row(x, x_next, v + moved * direction, v + 0.1 * apart, old, advantage, step))
    return found


class Moves:
    """A predictor whose velocities are given, as leaves that record gradients."""

    def __init__(self, velocities: torch.Tensor, settings: RolloutSettings) -> None:
        self.velocities, self.settings = velocities, settings

    def transition(self, part: Any) -> Any:
        return stochastic(self.settings, part.states, self.velocities, (part.sigmas, part.next_sigmas))


def as_batch(made: list[Row]) -> Transitions:
    def column(name: str) -> torch.Tensor:
        return torch.tensor(np.stack([getattr(row, name) for row in made]), dtype=torch.float32)

    steps = torch.tensor([row.step for row in made])
    levels = torch.tensor(SIGMAS)
    return Transitions(
        advantages=column("advantage"), weights=torch.full((len(made),), 1 / len(made)), steps=steps,
        candidates=steps, groups=steps, embeddings={}, states=column("x"), next_states=column("x_next"),
        sigmas=levels[steps], next_sigmas=levels[steps + 1], timesteps=steps.float(), log_probs=column("old"),
        means=torch.empty(0),
    )  # fmt: skip


KINDS = [("sde", "gaussian"), ("cps", "gaussian"), ("cps", "unscaled")]


@pytest.mark.parametrize(("dynamics", "density"), KINDS)
@given(seed=st.integers(0, 2**16))
def test_a_step_and_its_log_density(dynamics: Any, density: Any, seed: int) -> None:
    made = rows(dynamics, density == "unscaled", seed, moved=0.0)
    part = as_batch(made)
    settings = RolloutSettings(dynamics=dynamics, density=density)
    v = torch.tensor(np.stack([row.v for row in made]), dtype=torch.float32)
    move = stochastic(settings, part.states, v, (part.sigmas, part.next_sigmas))
    for row, mean, std, found in zip(
        made, move.mean, move.std.flatten(), log_prob(part.next_states, move), strict=True
    ):
        exact = derive(dynamics, SIGMAS[row.step], SIGMAS[row.step + 1], 0.7)
        expected = exact.of_x * row.x + exact.of_v * row.v
        assert np.abs(mean.numpy() - expected).max() < 2e-6 * max(1.0, np.abs(expected).max())
        assert float(std) == pytest.approx(exact.std, rel=1e-6)
        # Of the last step, whose std is 0.006, float32 has rounded x' by as much as 2e-5 stds.
        assert float(found) == pytest.approx(row.old, rel=2e-5 if exact.std > 0.05 else 1e-3, abs=1e-6)


def derived_loss(
    row: Row, dynamics: str, unscaled: bool, clip: float, beta: float, kl: str
) -> tuple[float, Floats]:
    """The loss of a row and its gradient in the velocity, by the chain rule."""
    sigma, nxt = SIGMAS[row.step], SIGMAS[row.step + 1]
    step = derive(dynamics, sigma, nxt, 0.7)
    mean, reference = (step.of_x * row.x + step.of_v * v for v in (row.v, row.v_ref))
    ratio = math.exp(log_density(row.x_next, mean, step.std, unscaled=unscaled) - row.old)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    surrogate = max(-row.advantage * ratio, -row.advantage * clipped)
    scale = 2 / SIZE if unscaled else 1 / (SIZE * step.std**2)
    gradient = np.zeros(SHAPE)
    if -row.advantage * ratio >= -row.advantage * clipped:  # the side that is not clipped has the gradient
        gradient = -row.advantage * ratio * scale * (row.x_next - mean) * step.of_v
    spread = 2 * step.std**2 / ((sigma - nxt) if kl == "flow_grpo" else 1)
    distance = float(np.mean((mean - reference) ** 2)) / spread
    gradient = gradient + beta * 2 * (mean - reference) * step.of_v / (SIZE * spread)
    return surrogate + beta * distance, gradient


@pytest.mark.parametrize("kl", ["gaussian", "flow_grpo"])
@pytest.mark.parametrize(("dynamics", "density"), KINDS)
@given(seed=st.integers(0, 2**16), clip=st.sampled_from([1e-5, 1e-3, 0.2]))
def test_the_loss_and_its_gradient(dynamics: Any, density: Any, kl: Any, seed: int, clip: float) -> None:
    unscaled, beta = density == "unscaled", 0.04
    made = rows(dynamics, unscaled, seed, moved=0.05)[:8]  # but the step of std 0.006, see above
    part = as_batch(made)
    settings = RolloutSettings(dynamics=dynamics, density=density)
    v = torch.tensor(np.stack([row.v for row in made]), dtype=torch.float32, requires_grad=True)
    reference = torch.tensor(np.stack([row.v_ref for row in made]), dtype=torch.float32)
    objective = FlowGRPO(FlowGRPOSettings(clip=clip, beta=beta, kl=kl))
    models: Any = Models(policy=Moves(v, settings), reference=Moves(reference, settings))  # type: ignore[arg-type]
    terms = objective.loss(models, part)
    (part.weights * terms.losses).sum().backward()
    assert v.grad is not None
    for row, loss, gradient in zip(made, terms.losses.tolist(), v.grad.numpy(), strict=True):
        expected, slope = derived_loss(row, dynamics, unscaled, clip, beta, kl)
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-5)
        on_the_edge = abs(abs(terms.metrics["ratio_mean"][row.step].item() - 1) - clip) < 1e-6
        if not on_the_edge:
            assert np.abs(len(made) * gradient - slope).max() < 1e-4 * np.abs(slope).max() + 1e-8


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=3, max_size=6), min_size=1, max_size=5)
)
def test_advantages_are_centred_by_prompt_and_scaled_by_all_rewards(rewards: list[list[float]]) -> None:
    """With everything kept: (r - mean of the prompt) / (std of all + 1e-4); those of zero are left out."""
    mean = sum(sum(group) for group in rewards) / sum(map(len, rewards))
    squares = [(reward - mean) ** 2 for group in rewards for reward in group]
    spread = math.sqrt(sum(squares) / len(squares))
    expected = {
        (number, place): (reward - sum(group) / len(group)) / (spread + 1e-4)
        for number, group in enumerate(rewards)
        for place, reward in enumerate(group)
        if len(set(group)) > 1
    }
    scores = [
        Scores(
            rewards={"one": np.array(group)}, weights={"one": 1.0}, valid=np.ones(len(group), np.bool_),
            total=np.array(group), strict=None,
        )
        for group in rewards
    ]  # fmt: skip
    selector = Selector(SelectionSettings(strategy="all", candidates=8, keep=2), seed=0)
    found = selector.select(0, list(range(len(rewards))), scores).kept
    assert {(one.group_id, one.candidate): one.advantage for one in found} == pytest.approx(
        expected, abs=1e-9
    )


def test_the_average_follows_the_weights_as_closely_as_flow_grpos() -> None:
    """Its code averages twice on every eighth update, with the same weights: a decay of 0.81."""
    parameter = nn.Parameter(torch.zeros(1))
    ours = Ema([("w", parameter)], Masters(0, 1), decay=0.81, every=8)
    theirs, lags = 0.0, []
    for update in range(1, 801):
        with torch.no_grad():
            parameter.fill_(float(update))  # a weight that grows by one per update: the lag is its distance
        ours.step(update)
        if update % 8 == 0:
            decay = min(0.9, (1 + update) / (10 + update))
            for _ in range(2):
                theirs = decay * theirs + (1 - decay) * update
        lags.append((update - ours.shadow["w"].item(), update - theirs))
    mine, published = np.mean(lags[400:], axis=0)
    assert mine == pytest.approx(published, abs=0.1)
    assert 34 < mine < 39  # and of a decay of 0.9, as its configuration says, 72
