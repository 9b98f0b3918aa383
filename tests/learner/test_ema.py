"""The moving average, followed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learner.ema import Ema
from learner.engine import Masters

ALONE = Masters(rank=0, world=1)


def weight(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((2,), value))


@torch.no_grad()
def follow(ema: Ema, parameter: nn.Parameter, values: list[float]) -> list[float]:
    seen = []
    for updates, value in enumerate(values, 1):
        parameter.fill_(value)
        ema.step(updates)
        seen.append(ema.shadow["w"][0].item())
    return seen


def test_the_decay_warms_up() -> None:
    parameter = weight(1.0)
    found = follow(Ema([("w", parameter)], ALONE, decay=0.9, every=1), parameter, [3.0, -1.0, 2.0])
    average, expected = 1.0, []
    for value, decay in ((3.0, 2 / 11), (-1.0, 3 / 12), (2.0, 4 / 13)):
        average = decay * average + (1 - decay) * value
        expected.append(average)
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_decay_stops_at_its_bound() -> None:
    parameter = weight(0.0)
    ema = Ema([("w", parameter)], ALONE, decay=0.5, every=1)
    with torch.no_grad():
        parameter.fill_(1.0)
    ema.step(1000)
    assert ema.shadow["w"].tolist() == [0.5, 0.5]


def test_it_averages_only_every_so_many_steps() -> None:
    parameter = weight(1.0)
    found = follow(Ema([("w", parameter)], ALONE, decay=0.9, every=3), parameter, [5.0, 6.0, 7.0, 8.0, 9.0])
    third = 4 / 13 * 1.0 + 9 / 13 * 7.0
    assert found == pytest.approx([1.0, 1.0, third, third, third])


def test_it_starts_from_a_copy() -> None:
    parameter = weight(1.0)
    ema = Ema([("w", parameter)], ALONE, decay=0.9, every=8)
    follow(ema, parameter, [4.0])
    assert ema.shadow["w"].tolist() == [1.0, 1.0]


def test_it_makes_the_trip_parameter_by_parameter() -> None:
    first, second = weight(1.0), weight(2.0)
    named = [("w", first), ("b", second)]
    ema, other = (Ema(named, ALONE, decay=0.9, every=1) for _ in range(2))
    follow(ema, first, [5.0])
    for name, parameter in named:
        other.load(name, parameter, ema.whole(name, parameter).clone())
        assert torch.equal(other.shadow[name], ema.shadow[name])
    assert not torch.equal(ema.shadow["w"], first)
