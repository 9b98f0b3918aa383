"""The process group of the learners that run in the test process, undone after the package's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.learner.tiny import Batch, model_settings, rollout_settings, sample


@pytest.fixture(scope="package")
def process_group() -> Iterator[None]:
    """Let workers join; afterwards leave neither a group nor its environment variables behind."""
    import torch.distributed as dist

    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="package")
def batch(pipeline_folder: Path) -> Batch:
    """Trajectories under the start policy with the default rollout."""
    return sample(model_settings(pipeline_folder), rollout_settings())
