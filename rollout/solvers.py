"""Solvers of the probability-flow ODE: Euler's, and diffusers' multistep ones on a family's noise levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from rollout.families.registry import Schedule
from rollout.sde import euler
from rollout.settings import SolverName

FIRST: Final = 1 - 1e-6
"""The first noise level of multistep solvers, which take the logarithm of one minus it."""

Solver = Callable[[Tensor, Tensor, int], Tensor]
"""A function that takes a numbered step from ``x`` (N, ...) along a velocity (N, ...), in order from 0."""


def solver(name: SolverName, schedule: Schedule) -> Solver:
    """Create the solver of one batch, which remembers the batch's earlier velocities."""
    if name == "euler":
        return lambda x, v, step: euler(x, v, schedule.sigmas[step], schedule.sigmas[step + 1])
    scheduler = _scheduler(name, schedule)
    return lambda x, v, step: scheduler.step(v, scheduler.timesteps[step], x, return_dict=False)[0]


def _scheduler(name: SolverName, schedule: Schedule) -> Any:
    """Create a scheduler of diffusers with other noise levels than its own."""
    made = {"dpm2": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[name](
        use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2, final_sigmas_type="zero"
    )
    made.set_timesteps(len(schedule.timesteps))
    made.sigmas = schedule.sigmas.cpu().clamp(max=FIRST)
    made.set_begin_index(0)
    return made
