"""The learning-rate schedule, and the optimizer whose step can be skipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learner.optimizer import LearningRateSchedule, build_optimizer
from learner.settings import LearnerSettings


@pytest.mark.parametrize(("steps", "expected"), [(0, [1, 1, 1]), (1, [0.5, 1, 1]), (3, [0.25, 0.5, 0.75])])
def test_the_learning_rate_rises_to_its_full_value(steps: int, expected: list[float]) -> None:
    schedule = LearningRateSchedule("constant", steps, 100)
    assert [schedule(step) for step in range(3)] == expected
    assert schedule(steps) == schedule(10_000) == 1


@pytest.mark.parametrize(("kind", "middle"), [("linear", 0.75), ("cosine", 0.8536)])
def test_the_learning_rate_falls_to_nothing_with_the_run(kind: str, middle: float) -> None:
    schedule = LearningRateSchedule(kind, 4, 20)
    assert schedule(3) == 0.8
    assert schedule(4) == 1
    assert schedule(8) == pytest.approx(middle, abs=1e-4)
    assert schedule(20) == schedule(50) == pytest.approx(0)
    factors = [schedule(step) for step in range(4, 21)]
    assert factors == sorted(factors, reverse=True)


def test_a_held_step_changes_nothing() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([("w", parameter)], LearnerSettings(gpus=0))
    parameter.grad = torch.full((3,), torch.nan)
    optimizer.hold = True
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3))
    assert not optimizer.state
    optimizer.hold = False
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert (parameter < 1).all()


def test_without_zero_the_optimizer_clips_and_tells_the_norm() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    settings = LearnerSettings(gpus=0, zero_stage=0, max_grad_norm=0.5)
    optimizer = build_optimizer([("w", parameter)], settings)
    parameter.grad = torch.full((4,), 3.0)
    optimizer.step()
    assert optimizer.norm == pytest.approx(6.0)
    assert parameter.grad.norm().item() == pytest.approx(0.5, rel=1e-4)
