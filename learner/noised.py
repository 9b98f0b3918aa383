"""Mini-batches of the forward process: clean latents, each with noise of random strengths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from learner.minibatch import Minibatch, columns_of
from learner.rank_shares import Assignment
from rollout.families.registry import Schedule
from rollout.noise import forward_noise, forward_times
from rollout.records import Conditioning, Trajectory
from rollout.tensors import borrow, upload


@dataclass(frozen=True, slots=True, kw_only=True)
class Noised(Minibatch):
    """Rows that are noised candidates: ``clean`` latents and ``noise`` (N, ...), at noise levels (N,).

    ``timesteps`` (N,) are the transformer's input. ``behaviour`` (N, ...) are the velocities of the behaviour
    policy, and empty where they are the policy's own.
    """

    clean: Tensor
    noise: Tensor
    sigmas: Tensor
    timesteps: Tensor
    behaviour: Tensor

    @property
    def levels(self) -> Tensor:
        """Noise levels that broadcast against latents, (N, 1, ...)."""
        return self.sigmas.view(-1, *[1] * (self.clean.ndim - 1))

    @property
    def states(self) -> Tensor:
        """The states (1 - sigma) clean + sigma noise, (N, ...)."""
        return torch.lerp(self.clean, self.noise, self.levels)

    @property
    def target(self) -> Tensor:
        """The velocity of the straight path through a state, noise - clean, (N, ...)."""
        return self.noise - self.clean


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedTable:
    """All noised rows of a share, ``draws`` consecutive ones per candidate, made ``size`` at a time.

    ``rows`` has the small columns of all of them, on the device; ``positions`` (N,) are their places in the
    schedule, in steps. The noise of a candidate stems from its seed of ``seeds`` alone.
    """

    rows: Minibatch
    positions: Tensor
    trajectories: Sequence[Trajectory]
    seeds: Sequence[int]
    schedule: Schedule
    draws: int
    size: int
    behaviour: Sequence[Tensor] | None = None
    """Velocities of the behaviour policy by mini-batch, unless they are the policy's own."""

    def __iter__(self) -> Iterator[Noised]:
        """Make mini-batches of at most ``size`` rows: equally many on ranks with equally many rows."""
        for number, part in enumerate(self.rows.split(self.size)):
            known = torch.empty(0) if self.behaviour is None else self.behaviour[number]
            yield self._noised(part, number * self.size, known)

    def with_behaviour(self, velocities: Sequence[Tensor]) -> Self:
        """Return the same rows with the behaviour policy's velocities, by mini-batch."""
        return replace(self, behaviour=velocities)

    def _noised(self, part: Minibatch, first: int, behaviour: Tensor) -> Noised:
        device, stop = self.schedule.sigmas.device, first + len(part.weights)
        begin, end = first // self.draws, -(-stop // self.draws)
        rows = slice(first - begin * self.draws, stop - begin * self.draws)
        clean = torch.stack([borrow(one.clean) for one in self.trajectories[begin:end]])
        noise = forward_noise(self.seeds[begin:end], self.draws, tuple(clean.shape[1:]))
        positions = self.positions[first:stop]
        return Noised(
            **{field.name: getattr(part, field.name) for field in fields(part)},
            clean=upload(clean.repeat_interleave(self.draws, 0)[rows], device).float(),
            noise=upload(noise[rows], device),
            sigmas=interpolated(self.schedule.sigmas, positions),
            timesteps=interpolated(torch.nn.functional.pad(self.schedule.timesteps, (0, 1)), positions),
            behaviour=behaviour,
        )


def interpolated(values: Tensor, positions: Tensor) -> Tensor:
    """Interpolate values (T + 1,) linearly at positions (N,) in [0, T)."""
    below = positions.long()
    return torch.lerp(values[below], values[below + 1], positions - below)


def noised(
    share: Sequence[Assignment],
    trajectories: Mapping[int, Trajectory],
    conditionings: Mapping[int, Conditioning],
    schedule: Schedule,
    *,
    draws: int,
    size: int,
    advantage_clip: float = math.inf,
) -> NoisedTable:
    """Build the noised rows of a share's candidates, for the device of the schedule, ``size`` at a time.

    Each candidate has ``draws`` rows, one in each of as many equal parts of the schedule, so that noise
    levels are as dense as the sampler's. Noise and levels stem from the assignments' seeds. Advantages are
    clipped to plus and minus ``advantage_clip``.
    """
    device, steps = schedule.sigmas.device, len(schedule.timesteps)
    seeds = [one.seed for one in share]
    positions = torch.tensor(forward_times(seeds, draws), dtype=torch.float32, device=device) * steps
    positions = positions.clamp(max=steps * (1 - 2**-24))  # rounding must not reach the end
    return NoisedTable(
        rows=Minibatch(
            steps=positions.long(), **columns_of(share, conditionings, draws, advantage_clip, device)
        ),
        positions=positions,
        trajectories=[trajectories[one.trajectory] for one in share],
        seeds=seeds,
        schedule=schedule,
        draws=draws,
        size=size,
    )
