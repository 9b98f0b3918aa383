"""Fixtures of the learner's tests: a batch of trajectories."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_learner import Batch, model_settings, rollout_settings, sample


@pytest.fixture(scope="package")
def batch(pipeline_folder: Path) -> Batch:
    """Trajectories under the start policy with the default rollout."""
    return sample(model_settings(pipeline_folder), rollout_settings())
