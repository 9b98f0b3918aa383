"""Broadcast to real samplers in actors: intact, damaged once, damaged always."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.actors.pool import call
from cluster.actors.samplers import Samplers, sampler_spec
from cluster.config.errors import LearnerError, PoolError, WeightsError
from cluster.config.settings import RunSettings
from rollout.records import Noise, Prompt, SampleRequest, Weights, WeightsId
from rollout.weights import buckets, checksum, flatten
from rollout.worker import RolloutWorker

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("node")]

PROMPT = Prompt(index=0, text="a photo of a circle")
NOISES = (Noise(initial=1, path=2),)
VERSION = 3


@pytest.fixture
def begin(configure: Callable[..., RunSettings], pipeline_folder: Path) -> Callable[[int], Samplers]:
    """Start one sampler that receives the first few parts damaged."""

    def make(damages: int) -> Samplers:
        model = {"path": str(pipeline_folder)}
        settings = configure(model=model, rollout={"workers": 1, "steps": 3})
        spec = sampler_spec(settings)
        arguments = {**spec.arguments, "damages": damages}
        return Samplers(
            settings, replace(spec, target="tests.support.damaged:DamagedSampler", arguments=arguments)
        )

    return make


@pytest.fixture
def weights(configure: Callable[..., RunSettings], pipeline_folder: Path) -> Weights:
    """Publish twice the values of the folder, in parts of at most 1 MB."""
    settings = configure(model={"path": str(pipeline_folder)})
    worker = RolloutWorker(settings.model, settings.rollout, seed=0)
    parts = buckets(worker.parameters, limit=1e6)
    flats = [2 * flatten(p for _, p in part) for part in parts]
    checksums = tuple(ray.put(checksum(flat, part)) for flat, part in zip(flats, parts, strict=True))
    assert len(parts) > 3
    return Weights(id=WeightsId(VERSION), checksums=checksums, parts=tuple(ray.put(flat) for flat in flats))


async def load(samplers: Samplers, weights: Weights) -> None:
    await samplers.pool.ready()
    await samplers.load(weights)


async def sample(samplers: Samplers) -> Any:
    request = SampleRequest(group_id=0, prompt=PROMPT, noises=NOISES, version=VERSION)
    slot = samplers.pool.slots[0]
    (chunk,) = (await call(slot, "sample", [request], deadline=60))[0]
    return chunk


@pytest.mark.parametrize("damages", [0, 1])
def test_what_was_damaged_once_is_sent_again(
    begin: Callable[[int], Samplers], weights: Weights, damages: int
) -> None:
    async def scenario() -> None:
        samplers = begin(damages)
        await load(samplers, weights)
        assert samplers.pool.slots[0].holds == WeightsId(VERSION)
        assert samplers.pool.restarts == 0
        assert (await sample(samplers)).finite == (True,)

    asyncio.run(scenario())


def test_what_is_damaged_again_stops_the_run_and_nothing_is_sampled(
    begin: Callable[[int], Samplers], weights: Weights
) -> None:
    async def scenario() -> None:
        samplers = begin(1000)
        with pytest.raises(WeightsError, match="sampler 0, v3: WeightsMismatch: weights arrived"):
            await load(samplers, weights)
        assert samplers.pool.slots[0].holds is None
        with pytest.raises(Exception, match="wants policy v3, not None"):
            await sample(samplers)

    asyncio.run(scenario())


def test_a_sampler_that_lost_its_weights_gets_them_before_it_samples(
    begin: Callable[[int], Samplers], weights: Weights
) -> None:
    async def scenario() -> None:
        samplers = begin(0)
        await load(samplers, weights)
        slot = samplers.pool.slots[0]
        slot.replace()
        with pytest.raises((PoolError, RuntimeError), match="not v0"):
            await sample(samplers)
        request = SampleRequest(group_id=0, prompt=PROMPT, noises=NOISES, version=VERSION)
        await samplers.sample((request,))
        assert slot.holds == WeightsId(VERSION)

    asyncio.run(scenario())


def test_a_learner_that_cannot_publish_is_not_the_samplers_fault(begin: Callable[[int], Samplers]) -> None:
    @ray.remote
    def part() -> None:
        raise OSError("out of memory")

    async def scenario() -> None:
        samplers = begin(0)
        digest, flat = part.options(num_returns=2).remote()
        with pytest.raises(LearnerError, match="learner publish: OSError: out of memory"):
            await load(samplers, Weights(id=WeightsId(1), checksums=(digest,), parts=(flat,)))
        assert samplers.pool.restarts == 0

    asyncio.run(scenario())
