"""The (trajectory, step) pairs of an update as tensors: what one forward pass of the learner sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.rank_shares import Item
from rollout.families.registry import Tensors
from rollout.records import Conditioning, Trajectory
from rollout.tensors import unpack


@dataclass(frozen=True, slots=True)
class Rows:
    """N pairs: states around a step (N, ...), behaviour log-probs, advantages, weights and steps (N,).

    ``trajectories`` (N,) numbers the trajectory that a row is of; ``means`` (N, ...) are the behaviour
    policy's, where they were kept.
    """

    states: Tensor
    next_states: Tensor
    log_probs: Tensor
    advantages: Tensor
    weights: Tensor
    steps: Tensor
    trajectories: Tensor
    means: Tensor | None
    groups: Tensor
    embeddings: Tensors
    """Conditioning tensors of the distinct groups (G, ...); ``groups`` (N,) says whose row is whose."""

    @property
    def conditioning(self) -> Tensors:
        """Conditioning tensors per row, (N, ...)."""
        return {name: table[self.groups] for name, table in self.embeddings.items()}

    def split(self, size: int) -> Iterator[Rows]:
        """Parts of at most ``size`` rows; all ranks hold equally many rows, so equally many parts."""
        for i in range(0, len(self.steps), size):
            part = slice(i, i + size)
            yield Rows(
                self.states[part], self.next_states[part], self.log_probs[part], self.advantages[part],
                self.weights[part], self.steps[part], self.trajectories[part],
                None if self.means is None else self.means[part], self.groups[part], self.embeddings,
            )  # fmt: skip


def rows_of(
    share: Sequence[Item],
    trajectories: Mapping[int, Trajectory],
    conditionings: Mapping[int, Conditioning],
    advantage_clip: float,
    device: str,
) -> Rows:
    """Lay out a share as rows; each trajectory's weight is spread evenly over its trained steps."""
    owners = list(dict.fromkeys(item.group_id for item in share))
    mine = [trajectories[item.trajectory] for item in share]
    latents = torch.stack([unpack(t.latents) for t in mine]).float().to(device)
    per_step = latents.shape[1] - 1

    def repeated(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).repeat_interleave(per_step)

    embeddings = {
        name: torch.stack([unpack(conditionings[g].arrays[name]) for g in owners]).to(device)
        for name in conditionings[owners[0]].arrays
    }
    return Rows(
        states=latents[:, :-1].flatten(0, 1),
        next_states=latents[:, 1:].flatten(0, 1),
        log_probs=torch.cat([unpack(t.log_probs) for t in mine]).to(device),
        advantages=repeated([_cut(item.advantage, advantage_clip) for item in share]),
        weights=repeated([item.weight / per_step for item in share]),
        steps=torch.cat([unpack(t.steps) for t in mine]).to(device),
        trajectories=repeated([item.trajectory for item in share]).long(),
        means=_means(mine, device),
        groups=repeated([owners.index(item.group_id) for item in share]).long(),
        embeddings=embeddings,
    )


def _means(trajectories: Sequence[Trajectory], device: str) -> Tensor | None:
    kept = [unpack(t.means) for t in trajectories if t.means is not None]
    return torch.cat(kept).to(device) if kept else None


def _cut(advantage: float, bound: float) -> float:
    return max(-bound, min(bound, advantage))
