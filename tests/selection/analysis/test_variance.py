"""Variance components: planted ones are found, without bias and within their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selection.analysis.variance import (
    COMPONENTS,
    component_draws,
    components,
    estimate,
    group_normalised,
    mean_squares,
)
from selection.strategies import Floats

PLANTED = np.array([0.25, 0.09, 0.36, 0.64])
"""Variances of prompt, initial noise, interaction and path."""


def planted(
    runs: int,
    design: tuple[int, int, int],
    *,
    seed: int = 0,
    uneven: bool = False,
    variances: Floats = PLANTED,
) -> Floats:
    """(runs, P, Z, E) rewards; ``uneven`` lets prompts differ in how much noise moves them."""
    rng = np.random.default_rng(seed)
    p, z, e = design
    scale = np.sqrt(rng.exponential(size=(runs, p, 1, 1))) if uneven else np.ones(())
    shapes = ((runs, p, 1, 1), (runs, 1, z, 1), (runs, p, z, 1), (runs, p, z, e))
    prompt, initial, cell, path = (
        rng.normal(size=shape) * np.sqrt(variance) for shape, variance in zip(shapes, variances, strict=True)
    )
    total: Floats = 3.0 + prompt + initial + scale * (cell + path)
    return total


def test_mean_squares_are_those_of_the_textbook() -> None:
    values = planted(1, (3, 4, 2))[0]
    p, z, e = values.shape
    whole = values.mean()
    sums = np.zeros(4)
    for i in range(p):
        sums[0] += z * e * (values[i].mean() - whole) ** 2 / (p - 1)
        for j in range(z):
            cell = values[i, j].mean()
            crossed = cell - values[i].mean() - values[:, j].mean() + whole
            sums[2] += e * crossed**2 / ((p - 1) * (z - 1))
            sums[3] += ((values[i, j] - cell) ** 2).sum() / (p * z * (e - 1))
    for j in range(z):
        sums[1] += p * e * (values[:, j].mean() - whole) ** 2 / (z - 1)
    np.testing.assert_allclose(mean_squares(values), sums)


def test_estimates_are_unbiased_within_two_percent() -> None:
    found = estimate(planted(12_000, (8, 8, 2)))
    error = found.std(1) / np.sqrt(found.shape[1])
    assert np.all(error < 0.01 * PLANTED)  # so that two percent can be told at all
    np.testing.assert_allclose(found.mean(1), PLANTED, rtol=0.02)


@pytest.mark.parametrize(("uneven", "least"), [(False, 93), (True, 90)])
def test_intervals_cover_what_was_planted(uneven: bool, least: int) -> None:
    """Of 100 runs of the default design; where prompts differ in their noise, a bit fewer."""
    runs = planted(800, (64, 8, 8), seed=5, uneven=uneven)
    low, high = np.quantile(component_draws(runs, seed=1, draws=600), [0.025, 0.975], axis=1)
    covered = (low <= PLANTED[:, None]) & (PLANTED[:, None] <= high)
    assert np.all(100 * covered.mean(1) >= least)
    assert np.all(100 * covered.mean(1) <= 99.5)  # an interval that always covers says nothing


def test_absent_components_are_not_found() -> None:
    nothing = np.array([0.0, 0.0, 0.0, 1.0])
    runs = planted(200, (16, 4, 4), variances=nothing)
    low, high = np.quantile(component_draws(runs, seed=1, draws=500), [0.025, 0.975], axis=1)
    assert np.all(((low[:3] <= 0) & (high[:3] >= 0)).mean(1) > 0.9)


def test_components_have_names_and_shares() -> None:
    found = components(planted(1, (64, 8, 8), seed=2)[0], seed=0)
    assert tuple(found) == COMPONENTS
    assert sum(one.share for one in found.values()) == pytest.approx(1.0)
    for one in found.values():
        assert one.low < one.variance < one.high
        assert 0 <= one.share_low <= one.share <= one.share_high <= 1


def test_the_same_seed_gives_the_same_intervals() -> None:
    values = planted(1, (6, 4, 3))[0]
    assert components(values, seed=4) == components(values, seed=4) != components(values, seed=5)


@settings(max_examples=15)
@given(shift=st.floats(-10, 10), scale=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_a_positive_affine_map_keeps_the_shares(shift: float, scale: float, seed: int) -> None:
    values = planted(1, (4, 3, 2), seed=seed)[0]
    before, after = components(values, seed=0), components(scale * values + shift, seed=0)
    for name in COMPONENTS:
        assert after[name].variance == pytest.approx(scale**2 * before[name].variance, abs=1e-6 * scale**2)
        assert after[name].share == pytest.approx(before[name].share, abs=1e-6)


def test_normalisation_removes_the_prompt_and_keeps_the_proportions_of_the_rest() -> None:
    values = planted(1, (200, 8, 8), seed=3)[0]
    normalised = group_normalised(values)
    np.testing.assert_allclose(normalised.mean((1, 2)), 0.0, atol=1e-12)
    np.testing.assert_allclose(normalised.std((1, 2)), 1.0, atol=1e-3)
    raw, after = components(values, seed=0), components(normalised, seed=0)
    assert after["prompt"].share == 0.0
    rest = 1 - raw["prompt"].share
    for name in COMPONENTS[1:]:
        assert after[name].share == pytest.approx(raw[name].share / rest, abs=0.05)


def test_rewards_that_tie_everywhere_have_no_variance() -> None:
    tied = np.full((4, 3, 2), 0.5)
    assert np.all(group_normalised(tied) == 0)
    assert all(one.variance == one.share == 0 for one in components(tied, seed=0).values())


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 1, 4), (4, 4, 1), (4, 4)])
def test_a_design_too_small_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two prompts, two initial noises and two paths"):
        estimate(np.zeros(shape))


def test_missing_rewards_are_refused() -> None:
    values = planted(1, (4, 3, 2))[0]
    values[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 24 values are not finite"):
        estimate(values)
