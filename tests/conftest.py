"""What tests of all stages share: patience, and a tiny pipeline on disk in the real format."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from cluster.process import leave

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
STATUS = pytest.StashKey[int]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare the garbage collector what the imports of all tests have made: it took 7% of their time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remember how the tests went, for when everything has been reported."""
    session.config.stash[STATUS] = exitstatus


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End as a run does: calls that tests gave up would crash an interpreter that is taken apart."""
    if STATUS in config.stash:
        leave(config.stash[STATUS])


@pytest.fixture(autouse=True)
def own_choice_of_attention() -> Iterator[None]:
    """Let torch choose kernels in the next test: what one asked of a model, diffusers has made everyone's."""
    yield
    diffusers = sys.modules.get("diffusers.models.attention_dispatch")
    if diffusers is not None:
        diffusers._AttentionBackendRegistry.set_active_backend(diffusers.AttentionBackendName.NATIVE)


@pytest.fixture(scope="session")
def joined_group() -> Iterator[None]:
    """End the process group that learners joined in this process, once: DeepSpeed joins no second one."""
    import torch.distributed as dist

    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def process_group(joined_group: None) -> Iterator[None]:
    """Let learners join a process group in this process; its environment variables go with the module."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD3 pipeline with SD3.5's schedule shift, and a scaled and shifted latent space."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from rollout.tiny.build import build_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = build_pipeline("shapes", seed=3)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.vae.register_to_config(shift_factor=0.1, scaling_factor=0.8)
    pipeline.save_pretrained(folder)
    return folder
