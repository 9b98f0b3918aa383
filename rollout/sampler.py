"""Denoising of candidates: stochastic and recorded inside the trained window, the ODE outside of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rollout.families.registry import Policy, Schedule, Tensors
from rollout.noise import derive_seed, initial_latents, path_noise
from rollout.records import Noise
from rollout.sde import DYNAMICS, Transition, log_prob
from rollout.settings import RolloutSettings, SolverName
from rollout.solvers import solver
from rollout.tensors import upload


@dataclass(frozen=True, slots=True)
class Rollout:
    """N candidates after ``steps`` steps: their states ``x`` and the predicted ``clean`` latents.

    Both are (N, ...); after the last step they are equal. Of the trained steps so far: ``states``
    (N, S + 1, ...) in the storage precision, ``log_probs`` (N, S) and, if kept, ``means`` (N, S, ...);
    without any, (N, 0).
    """

    steps: int
    x: Tensor
    clean: Tensor
    states: Tensor
    log_probs: Tensor
    means: Tensor


def trained_window(settings: RolloutSettings, seed: int, group_id: int) -> range:
    """Return the stochastic, trained steps of a group; a window smaller than its range is drawn at random."""
    start, stop = settings.window_range
    room = stop - start - settings.trained_steps
    first = start + derive_seed("window", seed, group_id) % (room + 1)
    return range(first, first + settings.trained_steps)


def transition(
    policy: Policy,
    settings: RolloutSettings,
    model: object,
    x: Tensor,
    conditioning: Tensors,
    sigmas: tuple[Tensor, Tensor],
    timestep: Tensor,
) -> Transition:
    """Compute the policy's distribution of the next state.

    ``x`` is (N, ...), ``sigmas`` the current and next noise level and ``timestep`` the transformer's input,
    each (N,). Gradients flow through ``model``.
    """
    v = policy.velocity(model, x, timestep, conditioning)  # type: ignore[arg-type]
    return stochastic(settings, x, v, sigmas)


def stochastic(settings: RolloutSettings, x: Tensor, v: Tensor, sigmas: tuple[Tensor, Tensor]) -> Transition:
    """Compute a stochastic step from ``x`` along velocity ``v``; rollout and learner share this function."""
    sigma, sigma_next = (s.view(-1, *[1] * (x.ndim - 1)) for s in sigmas)
    move = DYNAMICS[settings.dynamics](x, v, sigma, sigma_next, settings.noise_level)
    return replace(move, density=settings.log_density)


@torch.no_grad()
def denoise(
    policy: Policy,
    settings: RolloutSettings,
    conditioning: Tensors,
    noises: Sequence[Noise],
    schedule: Schedule,
    window: range,
    *,
    begun: Rollout | None = None,
    stop: int | None = None,
    keep_means: bool = False,
    name: SolverName | None = None,
) -> Rollout:
    """Sample a batch of candidates, or continue ``begun`` ones, up to step ``stop`` or to the end.

    Every conditioning tensor is (N, ...). States in the window pass through the storage precision as they
    are made: the learner reads what the sampler continued from. Without a window, the ODE's solver is that of
    the ``name``, or the settings'; beside one, and to continue candidates, it is Euler's, since the others
    would need the velocities before it.
    """
    device, shape = schedule.sigmas.device, policy.latent_shape()
    x = begun.x if begun else upload(initial_latents(noises, shape), device)
    storage = getattr(torch, settings.storage)
    states, log_probs, means = _so_far(begun)
    start, stop = begun.steps if begun else 0, stop or len(schedule.timesteps)
    clean = x
    solve = solver("euler" if window or start else name or settings.solver, schedule)
    for step in range(start, stop):
        if step in window:
            x = x.to(storage).float()
            states += [x] if not states else []
            # Drawn before the forward pass, while the device is still busy with the last step.
            noise = upload(path_noise(noises, step, shape), device)
        sigmas = tuple(schedule.sigmas[i].expand(len(x)) for i in (step, step + 1))
        v = policy.velocity(policy.transformer, x, schedule.timesteps[step].expand(len(x)), conditioning)
        clean = x - schedule.sigmas[step] * v
        if step not in window:
            x = solve(x, v, step)
            continue
        move = stochastic(settings, x, v, (sigmas[0], sigmas[1]))
        x = (move.mean + move.std * noise).to(storage).float()
        states.append(x)
        log_probs.append(log_prob(x, move))
        means += [move.mean] if keep_means else []
    nothing = torch.empty(len(x), 0)
    stacked = [torch.stack(one, 1) if one else nothing for one in (states, log_probs, means)]
    return Rollout(stop, x, clean, stacked[0].to(storage), stacked[1], stacked[2])


def started(x: Tensor) -> Rollout:
    """Return candidates at their start states ``x`` (N, ...), before the first step."""
    nothing = torch.empty(len(x), 0)
    return Rollout(0, x, x, nothing, nothing, nothing)


def _so_far(begun: Rollout | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the states, log-probs and means of the trained steps so far."""
    if begun is None:
        return [], [], []
    states, log_probs, means = (
        list(one.unbind(1)) for one in (begun.states.float(), begun.log_probs, begun.means)
    )
    return states, log_probs, means
