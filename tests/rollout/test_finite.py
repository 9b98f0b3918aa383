"""Tests of candidates that are not finite: they never pass as black images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout.families.registry import load_policy
from rollout.noise import candidate_noises
from rollout.records import Prompt, SampleRequest
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.tiny_families import TINY
from rollout.worker import RolloutWorker

PROMPT = Prompt(index=4, text="a photo of a red circle")
NOISES = candidate_noises(0, PROMPT.index, 7, 5)
REQUEST = SampleRequest(group_id=7, prompt=PROMPT, noises=NOISES, version=0)
BROKEN = (False, True, True, True, False)
"""Which of five candidates are finite when the first of every batch of four is poisoned."""


@pytest.fixture
def worker(pipeline_folder: Path) -> RolloutWorker:
    settings = RolloutSettings(
        width=32,
        height=32,
        steps=4,
        eval_steps=3,
        draft_steps=2,
        guidance=1.0,
        text_tokens=0,
        gpus=0,
        batch=4,
    )
    return RolloutWorker(ModelSettings(path=str(pipeline_folder)), settings, seed=0)


def poisoned(call: Any, value: float) -> Any:
    """The same function, with one value of the first row of what it returns replaced."""

    def first_row_spoilt(*arguments: Any) -> Tensor:
        found: Tensor = call(*arguments).clone()
        found[0].flatten()[5] = value
        return found

    return first_row_spoilt


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_candidate_whose_velocity_is_not_finite_is_named(
    worker: RolloutWorker, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    expected = worker.sample([REQUEST])[0].images
    monkeypatch.setattr(worker.policy, "velocity", poisoned(worker.policy.velocity, value))
    (made,) = worker.sample([REQUEST])
    assert made.finite == BROKEN
    assert np.array_equal(made.images[[1, 2, 3]], expected[[1, 2, 3]])
    (begun,) = worker.begin([REQUEST])
    assert begun.finite == BROKEN
    assert worker.finish([REQUEST], *begun.trajectories)[0].finite == BROKEN
    assert worker.evaluate([PROMPT] * 5, NOISES)[0] == BROKEN


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_pixel_that_is_not_finite_is_enough(
    worker: RolloutWorker, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Infinity would be white, and minus infinity black."""
    monkeypatch.setattr(worker.policy, "pixels", poisoned(worker.policy.pixels, value))
    (made,) = worker.sample([REQUEST])
    assert made.finite == BROKEN
    assert not made.images[[0, 4]].any()
    assert made.images[[1, 2, 3]].any()


def test_a_video_is_broken_by_a_frame_that_is_not_shown(tmp_path: Path) -> None:
    """Only the middle frame is decoded, but rewards must not judge the rest by it."""
    folder, rollout = TINY["wan"].save(tmp_path / "wan"), TINY["wan"].settings(guidance=1.0)
    policy = load_policy(ModelSettings(path=str(folder)), rollout, device="cpu", seed=0)
    latents = torch.zeros(2, *policy.latent_shape())
    latents[1, :, -1] = math.nan
    assert policy.pixels(latents).isfinite().all()
    images, finite = policy.decode(latents)
    assert finite.tolist() == [True, False]
    assert images.shape == (2, rollout.height, rollout.width, 3)
