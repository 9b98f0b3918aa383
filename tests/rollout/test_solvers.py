"""Solvers of the ODE on a flow whose solution is known: their order, and that Euler's is the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rollout.families.registry import Schedule
from rollout.sde import euler
from rollout.settings import SolverName
from rollout.solvers import solver

MEAN, STD = 0.7, 0.3
"""The data are normal; then so is every state, and its velocity is linear."""
NOISE = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[noise - clean | x] for x = (1 - t) clean + t noise."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    away = x - (1 - t) * MEAN
    return t / variance * away - (MEAN + (1 - t) * STD**2 / variance * away)


def error(name: SolverName, steps: int, shift: float = 1.0) -> float:
    """The largest distance from the exact end, which is mean + std * noise."""
    even = torch.linspace(1, 0, steps + 1)
    sigmas = shift * even / (1 + (shift - 1) * even)
    solve, x = solver(name, Schedule(sigmas, sigmas[:-1] * 1000)), NOISE
    for step in range(steps):
        x = solve(x, velocity(x, sigmas[step]), step)
    return float((x - (MEAN + STD * NOISE)).abs().max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "dpm2", "unipc"])
def test_more_steps_come_closer(name: SolverName, shift: float) -> None:
    found = [error(name, steps, shift) for steps in (4, 8, 16)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.3


@pytest.mark.parametrize("name", ["dpm2", "unipc"])
def test_second_order_needs_fewer_steps(name: SolverName) -> None:
    assert error(name, 10) < error("euler", 20)
    assert error(name, 20) < error("euler", 80)


def test_euler_is_the_step_of_the_ode() -> None:
    sigmas = torch.tensor([1.0, 0.6, 0.0])
    solve, v = solver("euler", Schedule(sigmas, sigmas[:-1] * 1000)), velocity(NOISE, torch.tensor(0.6))
    assert torch.equal(solve(NOISE, v, 1), euler(NOISE, v, sigmas[1], sigmas[2]))


@pytest.mark.parametrize("name", ["dpm2", "unipc"])
def test_the_first_step_is_eulers_and_all_is_finite(name: SolverName) -> None:
    """At pure noise there is no earlier velocity; the logarithm of the noise level's rest is infinite."""
    sigmas = torch.linspace(1, 0, 6)
    schedule = Schedule(sigmas, sigmas[:-1] * 1000)
    v = velocity(NOISE, sigmas[0])
    found = solver(name, schedule)(NOISE, v, 0)
    assert torch.allclose(found, euler(NOISE, v, sigmas[0], sigmas[1]), atol=1e-4)


@pytest.mark.parametrize("name", ["euler", "dpm2", "unipc"])
def test_rows_do_not_depend_on_their_batch(name: SolverName) -> None:
    sigmas = torch.linspace(1, 0, 5)
    schedule = Schedule(sigmas, sigmas[:-1] * 1000)

    def run(x: Tensor) -> Tensor:
        solve = solver(name, schedule)
        for step in range(4):
            x = solve(x, velocity(x, sigmas[step]), step)
        return x

    assert torch.allclose(run(NOISE)[5:9], run(NOISE[5:9]), atol=1e-6)
