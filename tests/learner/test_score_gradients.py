"""Score gradients against a plain gradient, and their projection against theory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from learner.score_gradients import RandomProjection, ScoreGradients
from rollout.noise import candidate_noises
from rollout.records import Prompt, SampleRequest
from rollout.tensors import unpack
from rollout.worker import RolloutWorker
from tests.support.tiny_learner import model_settings, rollout_settings, sampler


@pytest.fixture(scope="module")
def worker(pipeline_folder: Path) -> RolloutWorker:
    return sampler(model_settings(pipeline_folder), rollout_settings())


def score_gradients(worker: RolloutWorker, width: int = 512, seed: int = 1) -> ScoreGradients:
    return ScoreGradients(worker.policy, worker.settings, worker.parameters, width, seed)


def sampled(worker: RolloutWorker) -> tuple:  # type: ignore[type-arg]
    prompt = Prompt(index=0, text="a photo of a red circle")
    request = SampleRequest(group_id=0, prompt=prompt, noises=candidate_noises(0, 0, 0, 2), version=0)
    (chunk,) = worker.sample([request])
    conditioning, trajectories = chunk.conditioning, chunk.trajectories
    return conditioning, trajectories


def test_scores_are_the_gradient_of_the_mean_log_probability(worker: RolloutWorker) -> None:
    conditioning, trajectories = sampled(worker)
    found = score_gradients(worker).compute(conditioning, trajectories)
    schedule = worker.policy.schedule(4)
    texts = {name: unpack(array)[None] for name, array in conditioning.arrays.items()}
    latents = unpack(trajectories[1].states).float()
    parameters = [p.requires_grad_(True) for _, p in worker.parameters]
    total = torch.zeros(())
    for row, step in enumerate(trajectories[1].steps.tolist()):
        x, x_next = latents[row][None], latents[row + 1][None]
        sigma, nxt = schedule.sigmas[step], schedule.sigmas[step + 1]
        v = worker.policy.velocity(worker.policy.transformer, x, schedule.timesteps[step][None], texts)
        s = 0.7 * (sigma / (1 - (nxt if sigma == 1 else sigma))).sqrt()
        mean = x * (1 + s**2 * (nxt - sigma) / (2 * sigma))
        mean = mean + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * (nxt - sigma)
        total = total - ((x_next - mean) ** 2 / (2 * s**2 * (sigma - nxt))).mean() / len(
            trajectories[1].steps
        )
    total.backward()
    expected = score_gradients(worker).projection.gradient()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    assert np.linalg.norm(expected) > 0
    np.testing.assert_allclose(found[1], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_sampler_is_left_as_it_was(worker: RolloutWorker) -> None:
    before = [p.detach().clone() for _, p in worker.parameters]
    score_gradients(worker).compute(*sampled(worker))
    assert all(not p.requires_grad and p.grad is None for _, p in worker.parameters)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, worker.parameters, strict=True))


def test_projections_keep_inner_products() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=4000)
    second = 0.6 * first + 0.8 * rng.normal(size=4000)
    parameter = nn.Parameter(torch.zeros(40, 100))
    ratios = []
    for seed in range(50):
        projection = RandomProjection([("weight", parameter)], 256, seed)
        projected = []
        for vector in (first, second):
            parameter.grad = torch.tensor(vector, dtype=torch.float32).reshape(40, 100)
            projected.append(projection.gradient())
        ratios.append(float(projected[0] @ projected[1]) / float(first @ second))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.05)
    assert np.std(ratios) < 0.25


def test_a_projection_depends_on_its_seed_and_a_missing_gradient_is_zero() -> None:
    parameter = nn.Parameter(torch.zeros(5))
    assert not RandomProjection([("weight", parameter)], 8, 0).gradient().any()
    parameter.grad = torch.arange(5.0)
    one, same, other = (RandomProjection([("weight", parameter)], 8, seed).gradient() for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
