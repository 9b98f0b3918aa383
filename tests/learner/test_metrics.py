"""The metrics of an update."""

from __future__ import annotations

import math

import pytest
import torch

from learner.metrics import UpdateMetrics
from learner.minibatch import Minibatch
from learner.objectives.base import Metric, Terms
from learner.objectives.flow_grpo import FlowGRPO, FlowGRPOSettings

OBJECTIVE = FlowGRPO(FlowGRPOSettings(clip=0.1))


def objective(ratio: list[float], kl: list[float], loss: float) -> tuple[Terms, float]:
    """FlowGRPO's terms of given ratios and KLs, and the weighted loss, which is any number here."""
    given = torch.tensor(ratio)
    metrics = OBJECTIVE._figures(given, torch.tensor(kl))
    return Terms(losses=-given + torch.tensor(kl), prediction=given, metrics=metrics), loss


def rows(
    weights: list[float], steps: list[int] | None = None, advantages: list[float] | None = None
) -> Minibatch:
    count = len(weights)
    return Minibatch(
        embeddings={},
        advantages=torch.tensor(advantages or [1.0] * count), weights=torch.tensor(weights),
        steps=torch.tensor(steps or [0] * count), groups=torch.zeros(count).long(),
        candidates=torch.arange(count) + 10,
    )  # fmt: skip


def collected(*parts: tuple[tuple[Terms, float], Minibatch, bool]) -> UpdateMetrics:
    metrics = UpdateMetrics(OBJECTIVE.metrics, steps=3)
    for (found, loss), mine, first in parts:
        norms = torch.full((len(mine.weights),), 2.0)
        metrics.add(found, mine, torch.tensor(loss), norms, first=first)
    metrics.grad_norms += [1.0, 4.0]
    metrics.learning_rate = 3e-4
    return metrics


def test_sums_become_weighted_means() -> None:
    metrics = collected(
        (objective([1.0, 1.05], [0.0, 0.2], 0.4), rows([0.25, 0.25], advantages=[1.0, -3.0]), True),
        (objective([1.2], [0.4], -1.0), rows([0.5]), False),
        (objective([0.5], [0.8], 0.2), rows([1.0]), False),
    )
    found = metrics.reduce(seconds=1.5)
    assert {name: value for name, value in found.items() if ".t" not in name} == pytest.approx(
        {
            "loss": (0.4 - 1.0 + 0.2) / 2,
            "ratio_mean": (0.25 * 2.05 + 0.5 * 1.2 + 0.5) / 2,
            "ratio_max_deviation": 0.05,  # of the first update only
            "log_ratio": math.log(1.05) / 2,  # likewise
            "log_ratio_rms": math.log(1.05) / math.sqrt(2),
            "fresh_clip_fraction": 0,
            "clip_fraction": (0.5 + 1.0) / 2,
            "kl": (0.05 + 0.2 + 0.8) / 2,
            "advantage_rms": math.sqrt((0.25 + 0.25 * 9 + 0.5 + 1) / 2),
            "pull": 4.0,
            "grad_norm": 2.5,
            "learning_rate": 3e-4,
            "skipped_updates": 0,
            "seconds_learn": 1.5,
        },
        rel=1e-5,
    )


def test_every_step_has_its_own_figures() -> None:
    found = collected(
        (objective([1.0, 1.3, 1.5], [0.1, 0.2, 0.6], 0.0), rows([0.5, 0.25, 0.25], steps=[0, 2, 2]), True)
    ).reduce(seconds=0.0)
    assert found["ratio_mean.t0"] == 1
    assert found["ratio_mean.t2"] == pytest.approx(1.4)
    assert found["kl.t2"] == pytest.approx(0.4)
    assert found["clip_fraction.t0"] == 0
    assert found["clip_fraction.t2"] == 1
    assert found["pull.t2"] == pytest.approx(math.sqrt(8))
    assert "kl.t1" not in found  # not trained, so there is nothing to say


def test_padding_is_not_counted() -> None:
    found = collected(
        (objective([1.0, 7.0], [0.1, 9.0], 0.5), rows([1.0, 0.0]), True),
        (objective([9.0], [9.0], 0.0), rows([0.0]), True),
    ).reduce(seconds=0.0)
    assert found["ratio_max_deviation"] == 0
    assert found["ratio_mean"] == 1
    assert found["clip_fraction"] == 0
    assert found["kl"] == pytest.approx(0.1)


def test_trajectories_without_a_finite_objective_are_named() -> None:
    metrics = collected(
        (objective([1.0, math.nan, 1.0], [0.0, 0.0, 0.0], math.nan), rows([0.2, 0.2, 0.2]), True),
        (objective([math.inf], [0.0], math.inf), rows([0.2]), False),
    )
    assert metrics.suspects() == (10, 11)


def test_an_objective_reports_what_it_declares_and_no_more() -> None:
    """Means of all rows and of fresh ones, largest values, and no graph that would hold memory."""
    declared = [
        Metric(name="mine"), Metric(name="early", fresh=True),
        Metric(name="top", reduce="max"), Metric(name="early_top", reduce="max", fresh=True),
    ]  # fmt: skip
    metrics = UpdateMetrics(declared, steps=1)
    for values, first in (([1.0, 2.0], True), ([3.0, 8.0], False)):
        given = torch.tensor(values, requires_grad=True)
        found = Terms(losses=given, prediction=given, metrics={m.name: given for m in declared})
        metrics.add(found, rows([0.5, 0.0]), torch.tensor(0.0), torch.zeros(2), first=first)
    assert not any(one.requires_grad for one in (*metrics.sums, *metrics.peaks))
    metrics.grad_norms.append(1.0)
    reported = metrics.reduce(seconds=0.0)
    assert {name: reported[name] for name in ("mine", "early", "top", "early_top")} == {
        "mine": 2.0, "early": 1.0, "top": 3.0, "early_top": 1.0,
    }  # fmt: skip
    assert reported["mine.t0"] == 2.0
    assert "ratio_mean" not in reported


def test_an_objective_may_report_nothing_of_its_own() -> None:
    metrics = UpdateMetrics([], steps=1)
    losses = torch.ones(1)
    metrics.add(
        Terms(losses=losses, prediction=losses, metrics={}), rows([1.0]), losses.sum(), losses, first=True
    )
    metrics.grad_norms.append(1.0)
    assert metrics.reduce(seconds=0.0)["loss"] == 1.0
