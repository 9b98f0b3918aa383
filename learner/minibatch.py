"""Mini-batches: the rows of one forward pass of the learner, as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from learner.rank_shares import Assignment
from rollout.families.registry import Schedule, Tensors
from rollout.records import Conditioning, Keep, Trajectory
from rollout.tensors import borrow, unpack, upload


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """N rows with their advantages, weights, denoising steps, candidates and groups, all (N,).

    The weights of an update add up to one over all ranks; padded rows have weight zero. ``steps`` are the
    denoising steps under which rows are counted; ``candidates`` are places in the selection's kept
    candidates.
    """

    advantages: Tensor
    weights: Tensor
    steps: Tensor
    candidates: Tensor
    groups: Tensor
    embeddings: Tensors
    """Conditioning tensors of the distinct groups (G, ...), into which ``groups`` (N,) are indices."""

    @property
    def conditioning(self) -> Tensors:
        """Conditioning tensors per row, (N, ...)."""
        return {name: table[self.groups] for name, table in self.embeddings.items()}

    def split(self, size: int) -> Iterator[Self]:
        """Split into parts of at most ``size`` rows: equally many parts on ranks with equally many rows."""
        columns = [field.name for field in fields(self) if isinstance(getattr(self, field.name), Tensor)]
        for i in range(0, len(self.weights), size):
            yield replace(self, **{name: getattr(self, name)[i : i + size] for name in columns})


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions(Minibatch):
    """Rows that are stochastic steps: the states around each (N, ...), and its noise levels (N,).

    ``timesteps`` (N,) are the transformer's input. ``log_probs`` (N,) and ``means`` (N, ...) are those of the
    behaviour policy, and empty if the objective does not keep them.
    """

    states: Tensor
    next_states: Tensor
    sigmas: Tensor
    next_sigmas: Tensor
    timesteps: Tensor
    log_probs: Tensor
    means: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionTable:
    """All transitions of a share, of which only a mini-batch at a time is on the device.

    ``rows`` has the small columns of all of them, on the device; the trajectories stay where they arrived, in
    their storage precision, and are not copied.
    """

    rows: Minibatch
    trajectories: Sequence[Trajectory]
    schedule: Schedule
    size: int
    log_probs: Sequence[Tensor] | None = None
    """Old log-probs by mini-batch, if they are not the trajectories'."""

    def __iter__(self) -> Iterator[Transitions]:
        """Make mini-batches of at most ``size`` rows: equally many on ranks with equally many rows."""
        for number, part in enumerate(self.rows.split(self.size)):
            found = self._transitions(part, number * self.size)
            yield found if self.log_probs is None else replace(found, log_probs=self.log_probs[number])

    def with_log_probs(self, log_probs: Sequence[Tensor]) -> Self:
        """Return the same transitions with other old log-probs, by mini-batch."""
        return replace(self, log_probs=log_probs)

    def without_log_probs(self) -> Self:
        """Return the same transitions without old log-probs."""
        count = math.ceil(len(self.rows.weights) / self.size)
        return self.with_log_probs([torch.empty(0)] * count)

    def _transitions(self, part: Minibatch, first: int) -> Transitions:
        schedule, steps = self.schedule, part.steps
        spans = self._spans(first, first + len(part.weights))

        def gathered(name: Keep, after: int = 0) -> Tensor:
            found = [
                borrow(getattr(one, name))[span.start + after : span.stop + after] for one, span in spans
            ]
            return upload(torch.cat(found), schedule.sigmas.device).float()

        return Transitions(
            **{field.name: getattr(part, field.name) for field in fields(part)},
            states=gathered("states"),
            next_states=gathered("states", after=1),
            sigmas=schedule.sigmas[steps],
            next_sigmas=schedule.sigmas[steps + 1],
            timesteps=schedule.timesteps[steps],
            log_probs=gathered("log_probs"),
            means=gathered("means"),
        )

    def _spans(self, first: int, stop: int) -> list[tuple[Trajectory, range]]:
        """Return the trajectories that rows [first, stop) belong to, each with its steps among them."""
        count = len(self.trajectories[0].steps)
        return [
            (self.trajectories[i], range(max(first - i * count, 0), min(stop - i * count, count)))
            for i in range(first // count, -(-stop // count))
        ]


def transitions(
    share: Sequence[Assignment],
    trajectories: Mapping[int, Trajectory],
    conditionings: Mapping[int, Conditioning],
    schedule: Schedule,
    *,
    size: int,
    advantage_clip: float = math.inf,
) -> TransitionTable:
    """Build the transitions of a share's trajectories, for the device of the schedule, ``size`` at a time.

    Each candidate's weight is divided evenly among its trained steps. Advantages are clipped to plus and
    minus ``advantage_clip``.
    """
    device = schedule.sigmas.device
    mine = [trajectories[one.trajectory] for one in share]
    steps = torch.cat([unpack(one.steps) for one in mine]).to(device)
    columns = columns_of(share, conditionings, len(mine[0].steps), advantage_clip, device)
    rows = Minibatch(steps=steps, **columns)
    return TransitionTable(rows=rows, trajectories=mine, schedule=schedule, size=size)


def columns_of(
    share: Sequence[Assignment],
    conditionings: Mapping[int, Conditioning],
    count: int,
    advantage_clip: float,
    device: torch.device,
) -> dict[str, Any]:
    """Build the columns of a `Minibatch` but its steps, with ``count`` rows per assignment."""

    def repeated(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).repeat_interleave(count)

    owners = list(dict.fromkeys(one.group_id for one in share))
    return {
        "advantages": repeated([max(-advantage_clip, min(advantage_clip, a.advantage)) for a in share]),
        "weights": repeated([one.weight / count for one in share]),
        "candidates": repeated([one.trajectory for one in share]).long(),
        "groups": repeated([owners.index(one.group_id) for one in share]).long(),
        "embeddings": {
            name: torch.stack([unpack(conditionings[g].arrays[name]) for g in owners]).to(device)
            for name in conditionings[owners[0]].arrays
        },
    }
