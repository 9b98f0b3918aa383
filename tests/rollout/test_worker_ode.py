"""The worker with candidates of an ODE: drafts, clean latents, solvers, and what the noise decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout.settings import ModelSettings, RolloutSettings
from rollout.tensors import unpack
from rollout.worker import RolloutWorker
from tests.rollout.test_worker import NOISES, parts, request, start


@pytest.mark.parametrize("solver", ["euler", "dpm2", "unipc"])
def test_a_draft_by_an_ode_is_the_same_noise_in_fewer_steps(pipeline_folder: Path, solver: str) -> None:
    worker = start(pipeline_folder, steps=8, draft_steps=5, dynamics="ode", solver=solver, draft="ode")
    told, drafts, conditioning, *begun = parts(worker.begin([request(NOISES)]))
    assert (conditioning, begun) == (None, [None] * 5)
    assert told.finite == (True,) * 5
    shorter = start(pipeline_folder, steps=5, dynamics="ode", solver=solver)
    assert np.array_equal(drafts, shorter.sample([request(NOISES)])[0].images)
    _, images, *_ = parts(worker.sample([request(NOISES)]))
    own, another = (np.abs(drafts.astype(float) - found).mean() for found in (images, images[::-1]))
    assert own < another


def test_a_draft_of_an_sde_may_be_an_ode(pipeline_folder: Path) -> None:
    worker = start(pipeline_folder, steps=6, draft_steps=3, draft="ode")
    (chunk,) = worker.begin([request(NOISES)])
    ode = start(pipeline_folder, steps=3, dynamics="ode")
    assert np.array_equal(chunk.images, ode.sample([request(NOISES)])[0].images)


@pytest.mark.parametrize("dynamics", ["sde", "cps", "ode"])
def test_clean_latents_are_kept_where_they_are_wanted(pipeline_folder: Path, dynamics: str) -> None:
    settings = RolloutSettings(
        width=32, height=32, steps=5, guidance=1.0, text_tokens=0, gpus=0, batch=3, dynamics=dynamics
    )
    worker = RolloutWorker(ModelSettings(path=str(pipeline_folder)), settings, seed=0, keeps=("clean",))
    (chunk,) = worker.sample([request(NOISES)])
    for trajectory, image in zip(chunk.trajectories, chunk.images, strict=True):
        assert (trajectory.states.size, trajectory.log_probs.size, trajectory.means.size) == (0, 0, 0)
        assert trajectory.clean.dtype == np.float16
        drawn, finite = worker.policy.decode(unpack(trajectory.clean).float()[None])
        assert finite.all()
        assert np.abs(drawn[0].numpy().astype(int) - image.astype(int)).max() <= 1


def test_evaluations_have_the_solver_that_is_named(pipeline_folder: Path) -> None:
    prompts = [request(NOISES).prompt] * len(NOISES)

    def drawn(**solvers: str) -> Any:
        worker = start(pipeline_folder, steps=4, eval_steps=5, dynamics="ode", **solvers)
        return worker.evaluate(prompts, NOISES)[1]

    euler, second = drawn(), drawn(solver="dpm2")
    assert not np.array_equal(euler, second)
    assert np.array_equal(drawn(solver="dpm2", eval_solver="euler"), euler)
    assert np.array_equal(drawn(eval_solver="dpm2"), second)


def test_an_ode_depends_on_the_initial_noise_alone(pipeline_folder: Path) -> None:
    worker = start(pipeline_folder, steps=4, dynamics="ode")
    others = tuple(replace(noise, path=noise.path + 1) for noise in NOISES)
    (first,), (second,) = worker.sample([request(NOISES)]), worker.sample([request(others)])
    assert np.array_equal(first.images, second.images)
    assert len(first.trajectories[0].steps) == 0
