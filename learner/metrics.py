"""The metrics of an update, summed over mini-batches and ranks with the weights of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from learner.minibatch import Minibatch
from learner.objectives.base import Metric, Terms


class UpdateMetrics:
    """A collector of the terms of every mini-batch, whose values stay on the device until `reduce`."""

    def __init__(self, metrics: Sequence[Metric], steps: int, together: int = 1) -> None:
        """Start empty, for the objective's ``metrics``; ``steps`` is the schedule's length.

        ``together`` ranks have the same rows each, of which they divide the tokens.
        """
        self.together = together
        self.means = [metric for metric in metrics if metric.reduce != "max"]
        self.largest = [metric for metric in metrics if metric.reduce == "max"]
        self.steps = steps
        self.sums: list[Tensor] = []
        """Sums by step per mini-batch: weights, fresh weights, squares of ``pull`` and advantage, means."""
        self.losses: list[Tensor] = []
        self.peaks: list[Tensor] = []
        self.broken: list[tuple[Tensor, Tensor]] = []
        self.grad_norms: list[float] = []
        self.learning_rate = 0.0
        self.skipped = 0

    def add(
        self, terms: Terms, part: Minibatch, loss: Tensor, mean_grad_norms: Tensor, *, first: bool
    ) -> None:
        """Add one mini-batch and its weighted ``loss``.

        ``mean_grad_norms`` (N,) are the norms of the loss's gradient in each row's prediction, for the metric
        ``pull``. ``first`` is True before the first optimizer step of the batch.
        """
        weights, fresh = part.weights, float(first) * part.weights
        found = {name: value.detach().float() for name, value in terms.metrics.items()}
        columns = [weights, fresh, mean_grad_norms**2, weights * part.advantages**2] + [
            (fresh if metric.fresh else weights) * found[metric.name] ** metric.exponent
            for metric in self.means
        ]
        table = torch.zeros(self.steps, len(columns), device=weights.device)
        self.sums.append(table.index_add(0, part.steps, torch.stack(columns, 1)))
        self.losses.append(loss)
        if self.largest:
            seen = [found[m.name] * ((fresh if m.fresh else weights) > 0) for m in self.largest]
            self.peaks.append(torch.stack(seen).amax(1))
        self.broken.append((part.candidates, ~terms.losses.detach().isfinite()))

    def suspects(self) -> tuple[int, ...]:
        """Return the trajectories of this rank whose loss is not finite."""
        return tuple(sorted({int(t) for rows, bad in self.broken for t in rows[bad].tolist()}))

    def reduce(self, seconds: float) -> dict[str, float]:
        """Average over all ranks, for all steps together and for each (``NAME.tSTEP``); collective.

        ``pull`` is the norm of the loss's gradient in the predictions.
        """
        table, loss = torch.stack(self.sums).sum(0), torch.stack(self.losses).sum()
        peaks = torch.stack(self.peaks).amax(0) if self.largest else torch.empty(0, device=loss.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(table)
            dist.all_reduce(loss)
            if self.largest:
                dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
            table, loss = table / self.together, loss / self.together
        table = table.cpu()
        return {
            "loss": loss.item() / table[:, 0].sum().item(),
            **dict(zip([metric.name for metric in self.largest], peaks.tolist(), strict=True)),
            **self._averages(table.sum(0)),
            "grad_norm": sum(self.grad_norms) / len(self.grad_norms),
            "learning_rate": self.learning_rate,
            "skipped_updates": float(self.skipped),
            "seconds_learn": seconds,
            **{
                f"{name}.t{step}": value
                for step, row in enumerate(table)
                if row[0] > 0
                for name, value in self._averages(row).items()
            },
        }

    def _averages(self, sums: Tensor) -> dict[str, float]:
        weight, fresh, squared, advantage, *rest = sums.tolist()
        totals = {True: fresh, False: weight}
        return {
            **{
                metric.name: (value / totals[metric.fresh] if totals[metric.fresh] else 0.0)
                ** (1 / metric.exponent)
                for metric, value in zip(self.means, rest, strict=True)
            },
            "advantage_rms": (advantage / weight) ** 0.5,
            "pull": squared**0.5,
        }
