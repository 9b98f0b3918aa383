"""What an update reports, summed over micro-batches and ranks with the weights of the loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from learner.loss import Objective


class UpdateMetrics:
    """Collects the objective of every micro-batch; stays on the device until it is reduced."""

    def __init__(self, clip: float) -> None:
        """``clip`` is the range outside of which a ratio counts as clipped."""
        self.clip = clip
        self.sums: list[Tensor] = []
        self.deviation = torch.zeros(1)
        self.grad_norms: list[float] = []
        self.learning_rate = 0.0

    def add(self, objective: Objective, weights: Tensor, *, first: bool) -> None:
        """Count one micro-batch; ``first`` says that the policy has not moved yet in this batch."""
        ratio, real = objective.ratio, weights > 0
        off = (ratio - 1).abs()
        clipped = (off > self.clip).float()
        columns = torch.stack([torch.ones_like(ratio), ratio, clipped, objective.kl]) * weights
        self.sums.append(torch.cat([objective.loss.detach().view(1), columns.sum(1)]).cpu())
        if first and bool(real.any()):
            self.deviation = torch.maximum(self.deviation, off[real].max().cpu())

    def reduce(self, seconds: float) -> dict[str, float]:
        """Averages over the whole world; collective.

        ``ratio_max_deviation`` is the largest |ratio - 1| before the first optimizer step of the batch:
        at staleness 0 it measures how far rollout and learner disagree, and should be about zero.
        """
        total = torch.stack(self.sums).sum(0)
        if dist.is_initialized() and dist.get_world_size() > 1:
            total, self.deviation = _over_ranks(total, self.deviation)
        loss, weight, ratio, clipped, kl = total.tolist()
        return {
            "loss": loss / weight,
            "ratio_mean": ratio / weight,
            "ratio_max_deviation": self.deviation.item(),
            "clip_fraction": clipped / weight,
            "kl": kl / weight,
            "grad_norm": sum(self.grad_norms) / len(self.grad_norms),
            "learning_rate": self.learning_rate,
            "seconds_learn": seconds,
        }


def _over_ranks(total: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total, deviation = total.to(device), deviation.to(device)
    dist.all_reduce(total)
    dist.all_reduce(deviation, op=dist.ReduceOp.MAX)
    return total.cpu(), deviation.cpu()
