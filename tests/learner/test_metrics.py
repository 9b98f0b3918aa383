"""What an update reports."""

from __future__ import annotations

import pytest
import torch

from learner.engine import Warmup
from learner.loss import Objective
from learner.metrics import UpdateMetrics


def objective(ratio: list[float], kl: list[float], loss: float) -> Objective:
    return Objective(torch.tensor(loss), torch.tensor(ratio), torch.tensor(kl))


def test_sums_become_weighted_means() -> None:
    metrics = UpdateMetrics(clip=0.1)
    metrics.add(objective([1.0, 1.05], [0.0, 0.2], 0.4), torch.tensor([0.25, 0.25]), first=True)
    metrics.add(objective([1.2], [0.4], -1.0), torch.tensor([0.5]), first=False)
    metrics.add(objective([0.5], [0.8], 0.2), torch.tensor([1.0]), first=False)
    metrics.grad_norms += [1.0, 4.0]
    metrics.learning_rate = 3e-4
    found = metrics.reduce(seconds=1.5)
    assert found == pytest.approx(
        {
            "loss": (0.4 - 1.0 + 0.2) / 2,
            "ratio_mean": (0.25 * 2.05 + 0.5 * 1.2 + 0.5) / 2,
            "ratio_max_deviation": 0.05,  # of the first update only
            "clip_fraction": (0.5 + 1.0) / 2,
            "kl": (0.05 + 0.2 + 0.8) / 2,
            "grad_norm": 2.5,
            "learning_rate": 3e-4,
            "seconds_learn": 1.5,
        },
        rel=1e-5,
    )


def test_padding_is_not_counted() -> None:
    metrics = UpdateMetrics(clip=0.1)
    metrics.add(objective([1.0, 7.0], [0.1, 9.0], 0.5), torch.tensor([1.0, 0.0]), first=True)
    metrics.add(objective([9.0], [9.0], 0.0), torch.tensor([0.0]), first=True)
    metrics.grad_norms.append(1.0)
    found = metrics.reduce(seconds=0.0)
    assert found["ratio_max_deviation"] == 0
    assert found["ratio_mean"] == 1
    assert found["clip_fraction"] == 0
    assert found["kl"] == pytest.approx(0.1)


@pytest.mark.parametrize(("steps", "expected"), [(0, [1, 1, 1]), (1, [0.5, 1, 1]), (3, [0.25, 0.5, 0.75])])
def test_the_learning_rate_rises_to_its_full_value(steps: int, expected: list[float]) -> None:
    warmup = Warmup(steps)
    assert [warmup(step) for step in range(3)] == expected
    assert warmup(steps) == warmup(10_000) == 1
