"""Weights on their way to real samplers in actors: whole, damaged once, damaged always."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.actors import stages
from cluster.actors.actor_spec import Role
from cluster.actors.learner import LearnerError
from cluster.actors.pool import PoolError, call
from cluster.actors.stages import Rollouts, WeightsError
from cluster.config.settings import RunSettings
from rollout.records import Noise, Prompt, SampleRequest, Weights
from rollout.tensors import buckets, checksum, flatten
from rollout.worker import RolloutWorker

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("node")]

PROMPT = Prompt(index=0, text="a photo of a circle")
VERSION = 3


@pytest.fixture
def begin(
    configure: Callable[..., RunSettings], pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Rollouts]:
    """Start one sampler whose line damages the first so many parts."""

    def make(damages: int) -> Rollouts:
        def bad(**role: Any) -> Role:
            arguments = {**role["arguments"], "damages": damages}
            target = "tests.support.damaged:DamagedSampler"
            return Role(**{**role, "target": target, "arguments": arguments})

        monkeypatch.setattr(stages, "Role", bad)
        return Rollouts(configure(model={"path": str(pipeline_folder)}, rollout={"workers": 1, "steps": 3}))

    return make


@pytest.fixture
def weights(configure: Callable[..., RunSettings], pipeline_folder: Path) -> Weights:
    """Twice the values of the folder, in parts of at most 1 MB."""
    settings = configure(model={"path": str(pipeline_folder)})
    worker = RolloutWorker(settings.model, settings.rollout, seed=0)
    parts = buckets(worker.parameters, limit=1e6)
    flats = [2 * flatten(p for _, p in part) for part in parts]
    checksums = tuple(ray.put(checksum(flat, part)) for flat, part in zip(flats, parts, strict=True))
    assert len(parts) > 3
    return Weights(version=VERSION, checksums=checksums, parts=tuple(ray.put(flat) for flat in flats))


async def load(rollouts: Rollouts, weights: Weights) -> None:
    await rollouts.pool.ready()
    await rollouts.load(weights)


async def sample(rollouts: Rollouts) -> Any:
    request = SampleRequest(group_id=0, prompt=PROMPT, noises=(Noise(initial=1, path=2),), version=VERSION)
    slot = rollouts.pool.slots[0]
    return (await call(slot, "sample", [request], deadline=60))[0]


@pytest.mark.parametrize("damages", [0, 1])
def test_what_was_damaged_once_is_sent_again(
    begin: Callable[[int], Rollouts], weights: Weights, damages: int
) -> None:
    async def scenario() -> None:
        rollouts = begin(damages)
        await load(rollouts, weights)
        assert rollouts.pool.slots[0].holds == str(VERSION)
        assert rollouts.pool.restarts == 0
        assert (await sample(rollouts))[0].finite == (True,)

    asyncio.run(scenario())


def test_what_is_damaged_again_stops_the_run_and_nothing_is_sampled(
    begin: Callable[[int], Rollouts], weights: Weights
) -> None:
    async def scenario() -> None:
        rollouts = begin(1000)
        with pytest.raises(WeightsError, match="sampler 0, v3: WeightsMismatch: weights arrived"):
            await load(rollouts, weights)
        assert rollouts.pool.slots[0].holds == ""
        with pytest.raises(Exception, match="wants policy v3, not v-1"):
            await sample(rollouts)

    asyncio.run(scenario())


def test_a_sampler_that_lost_its_weights_gets_them_before_it_samples(
    begin: Callable[[int], Rollouts], weights: Weights
) -> None:
    async def scenario() -> None:
        rollouts = begin(0)
        await load(rollouts, weights)
        slot = rollouts.pool.slots[0]
        slot.replace()
        with pytest.raises((PoolError, RuntimeError), match="not v-1"):
            await sample(rollouts)
        await rollouts.sample((rollouts.request(PROMPT, 0, version=VERSION),))
        assert slot.holds == str(VERSION)

    asyncio.run(scenario())


def test_a_learner_that_cannot_publish_is_not_the_samplers_fault(begin: Callable[[int], Rollouts]) -> None:
    @ray.remote
    def part() -> None:
        raise OSError("out of memory")

    async def scenario() -> None:
        rollouts = begin(0)
        digest, flat = part.options(num_returns=2).remote()
        with pytest.raises(LearnerError, match="learner publish: OSError: out of memory"):
            await load(rollouts, Weights(version=1, checksums=(digest,), parts=(flat,)))
        assert rollouts.pool.restarts == 0

    asyncio.run(scenario())
