"""What an update reports, summed over micro-batches and ranks with the weights of the loss."""

from __future__ import annotations

from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from learner.loss import Objective
from learner.minibatch import Rows

COLUMNS: Final = ("weight", "ratio", "clipped", "kl", "advantage", "pull", "drift", "first")
"""Sums per denoising step; ``drift`` and ``first`` count only rows that the unchanged policy has seen."""


class UpdateMetrics:
    """Collects the objective of every micro-batch; stays on the device until it is reduced."""

    def __init__(self, clip: float, steps: int) -> None:
        """Ratios outside of ``clip`` count as clipped; ``steps`` is the schedule's length."""
        self.clip, self.steps = clip, steps
        self.sums: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.deviations: list[Tensor] = []
        self.broken: list[tuple[Tensor, Tensor]] = []
        self.grad_norms: list[float] = []
        self.learning_rate = 0.0
        self.skipped = 0

    def add(self, objective: Objective, rows: Rows, pull: Tensor, *, first: bool) -> None:
        """Count one micro-batch.

        ``pull`` (N,) is the norm of the loss's gradient in each row's mean; ``first`` says that the policy
        has not moved yet in this batch.
        """
        ratio, weights = objective.ratio, rows.weights
        off = (ratio - 1).abs()
        fresh = float(first) * weights
        columns = [
            weights, weights * ratio, weights * (off > self.clip), weights * objective.kl,
            weights * rows.advantages**2, pull**2, fresh * ratio.log().abs(), fresh,
        ]  # fmt: skip
        table = torch.zeros(self.steps, len(COLUMNS), device=ratio.device)
        self.sums.append(table.index_add(0, rows.steps, torch.stack(columns, 1)))
        self.losses.append(objective.loss.detach())
        self.deviations.append((off * (fresh > 0)).max())
        self.broken.append((rows.trajectories, ~(objective.surrogate + objective.kl).isfinite()))

    def suspects(self) -> tuple[int, ...]:
        """The trajectories of this rank whose objective was not finite."""
        return tuple(sorted({int(t) for rows, bad in self.broken for t in rows[bad].tolist()}))

    def reduce(self, seconds: float) -> dict[str, float]:
        """Averages over the whole world, of all steps and (``NAME.tSTEP``) of each; collective.

        ``ratio_max_deviation`` is the largest |ratio - 1| before the first optimizer step of the batch:
        at staleness 0 it measures how far rollout and learner disagree, and should be about zero. ``drift``
        is the mean |log-ratio| there. ``pull`` is the norm of the loss's gradient in the predicted means.
        """
        table, loss = torch.stack(self.sums).sum(0), torch.stack(self.losses).sum()
        deviation = torch.stack(self.deviations).max()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(table)
            dist.all_reduce(loss)
            dist.all_reduce(deviation, op=dist.ReduceOp.MAX)
        table = table.cpu()
        return {
            "loss": loss.item() / table[:, 0].sum().item(),
            "ratio_max_deviation": deviation.item(),
            **_averages(table.sum(0)),
            "grad_norm": sum(self.grad_norms) / len(self.grad_norms),
            "learning_rate": self.learning_rate,
            "skipped_updates": float(self.skipped),
            "seconds_learn": seconds,
            **{
                f"{name}.t{step}": value
                for step, row in enumerate(table)
                if row[0] > 0
                for name, value in _averages(row).items()
            },
        }


def _averages(sums: Tensor) -> dict[str, float]:
    weight, ratio, clipped, kl, advantage, pull, drift, first = sums.tolist()
    return {
        "ratio_mean": ratio / weight,
        "clip_fraction": clipped / weight,
        "kl": kl / weight,
        "advantage_rms": (advantage / weight) ** 0.5,
        "pull": pull**0.5,
        "drift": drift / first if first else 0.0,
    }
