"""The gradient split: what was planted is found, on plain vectors and on a policy whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from selection.analysis.gradients import by_margin_rank, split
from selection.strategies import Floats


def planted(prompts: int, candidates: int, dims: int = 40, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    mean = np.full(dims, 0.2)
    between = rng.normal(size=(prompts, 1, dims)) * 0.5
    within = rng.normal(size=(prompts, candidates, dims)) * np.linspace(0.5, 1.5, dims)
    return np.asarray(mean + between + within)


def test_planted_traces_are_found_within_five_percent() -> None:
    found = split(planted(400, 8))
    assert found.between.value == pytest.approx(40 * 0.25, rel=0.05)
    assert found.within.value == pytest.approx(float((np.linspace(0.5, 1.5, 40) ** 2).sum()), rel=0.05)
    assert found.signal.value == pytest.approx(40 * 0.04, rel=0.05)


def test_the_split_is_unbiased_in_small_batches() -> None:
    found = [split(planted(4, 3, seed=seed)) for seed in range(4000)]
    assert np.mean([one.between.value for one in found]) == pytest.approx(10.0, rel=0.02)
    assert np.mean([one.signal.value for one in found]) == pytest.approx(1.6, rel=0.05)


def test_errors_say_how_far_off_estimates_are() -> None:
    found = [split(planted(16, 4, seed=seed)) for seed in range(300)]
    for name in ("between", "within", "signal"):
        estimates = [getattr(one, name) for one in found]
        scatter = np.std([one.value for one in estimates])
        assert np.mean([one.error for one in estimates]) == pytest.approx(scatter, rel=0.15)


def gaussian_policy(prompts: int, candidates: int, dims: int, spread: float) -> tuple[Floats, Floats, Floats]:
    """Actions N(theta, 1) with reward u_p . action, advantages normalised per group: a ~ theta + noise.

    The score is the noise x, so g = (u_p . x) x for |u_p| = 1: its mean is u_p, its covariance I + u u'.
    """
    rng = np.random.default_rng(7)
    directions = np.eye(dims)[0] + spread * rng.normal(size=(prompts, dims)) / np.sqrt(dims)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    noise = rng.normal(size=(prompts, candidates, dims))
    rewards = np.einsum("pnd,pd->pn", noise, directions)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)
    return advantages[:, :, None] * noise, rewards, directions


def test_a_gaussian_policy_has_the_covariance_that_theory_says() -> None:
    gradients, _, directions = gaussian_policy(prompts=500, candidates=400, dims=10, spread=1.0)
    found = split(gradients)
    mean = directions.mean(0)
    assert found.within.value == pytest.approx(10 + 1, rel=0.05)
    assert found.between.value == pytest.approx(1 - float(mean @ mean), rel=0.05)
    assert found.signal.value == pytest.approx(float(mean @ mean), rel=0.05)
    assert found.snr_within == pytest.approx(found.signal.value / found.within.value)
    assert found.noise_within == pytest.approx(found.within.value / 200_000)


def test_wide_margins_point_along_the_gradient_and_narrow_ones_nowhere() -> None:
    gradients, rewards, _ = gaussian_policy(prompts=200, candidates=16, dims=10, spread=0.5)
    found = by_margin_rank(gradients, rewards)
    assert found.cosine.shape == (8,)
    assert np.all(np.diff(found.margin) < 0)
    assert found.cosine[0] > 0.5
    assert abs(found.cosine[-1]) < 0.2
    assert found.aligned.sum() == pytest.approx(1.0)
    # Gaussian rewards: the extreme half of the candidates carries 93% of the squared advantages.
    assert found.aligned[:4].sum() == pytest.approx(0.93, abs=0.03)


def test_many_pairs_are_put_together() -> None:
    gradients, rewards, _ = gaussian_policy(prompts=100, candidates=40, dims=10, spread=0.5)
    fine, coarse = (by_margin_rank(gradients, rewards, ranks) for ranks in (20, 8))
    assert coarse.pairs.tolist() == [3, 3, 3, 3, 2, 2, 2, 2]
    assert coarse.aligned[0] == pytest.approx(fine.aligned[:3].sum())
    assert coarse.margin[-1] == pytest.approx(fine.margin[-2:].mean())
    assert coarse.cosine[0] > fine.cosine[0]  # together they say it more clearly


def test_a_prompt_is_not_its_own_reference() -> None:
    rng = np.random.default_rng(0)
    found = by_margin_rank(rng.normal(size=(300, 2, 50)), rng.normal(size=(300, 2)))
    assert abs(found.cosine[0]) < 4 * found.cosine_error[0]
    assert found.cosine_error[0] < 0.02


def test_an_odd_candidate_in_the_middle_is_in_no_pair() -> None:
    found = by_margin_rank(planted(5, 7), np.random.default_rng(0).normal(size=(5, 7)))
    assert found.cosine.shape == found.margin.shape == (3,)


@pytest.mark.parametrize("shape", [(1, 4, 3), (4, 1, 3)])
def test_batches_too_small_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two prompts of two candidates"):
        split(np.zeros(shape))
    with pytest.raises(ValueError, match="two prompts of two candidates"):
        by_margin_rank(np.zeros(shape), np.zeros(shape[:2]))
