"""Samplers as actors: weights before work, late ones, and groups that share a forward pass."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.actors.pool import call
from cluster.actors.samplers import Samplers, sampler_spec
from cluster.config.settings import RunSettings
from cluster.loop.drawing import oversampled
from cluster.loop.shared_batches import Batches
from rollout.batches import Batch, batches
from rollout.records import Chunk, Noise, Prompt, Weights, WeightsId
from rollout.settings import RolloutSettings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("node")]

HERE = "tests.support.workers"
PROMPT = Prompt(index=0, text="a photo of a circle")


def small(configure: Any, workers: int, batch: int, **run: Any) -> RunSettings:
    selection = {"candidates": 4, "keep": 2}
    settings: RunSettings = configure(
        rollout={"workers": workers, "batch": batch}, selection=selection, **run
    )
    return settings


@pytest.fixture
def samplers(configure: Any) -> Samplers:
    """The pool of samplers, with workers that start at once instead of loading a model."""
    settings = small(configure, 1, 3, max_staleness=1)
    return Samplers(settings, replace(sampler_spec(settings), target=f"{HERE}:FakeSampler"))


def batches_of(size: int, groups: Sequence[int], version: int) -> list[Batch]:
    rollout = RolloutSettings(batch=size)
    return batches([oversampled(PROMPT, group, 4, seed=0, version=version) for group in groups], rollout)


async def sampled(samplers: Samplers, group_id: int, *, version: int) -> Any:
    """The images of a group, in its order."""
    made = await asyncio.gather(*map(samplers.sample, batches_of(3, [group_id], version)))
    return np.concatenate([await chunk.images for (chunk,) in made])


@pytest.fixture
def late(configure: Any, tmp_path: Path) -> Callable[[float], Samplers]:
    """Two samplers, of which one starts slowly."""

    def make(seconds: float) -> Samplers:
        settings = small(configure, 2, 1)
        spec = sampler_spec(settings)
        own = {"marker": str(tmp_path / "first"), "seconds": seconds}
        arguments = {**spec.arguments, **own}
        return Samplers(settings, replace(spec, target=f"{HERE}:LateSampler", arguments=arguments))

    return make


def test_nobody_waits_for_a_sampler_that_does_not_come(late: Any) -> None:
    async def scenario() -> None:
        samplers = late(600.0)
        await samplers.pool.ready(1)
        await samplers.load(published(7))
        assert (await sampled(samplers, 3, version=7))[:, 2].tolist() == [17.0] * 4
        assert len(samplers.pool.up) == 1

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_late_sampler_gets_the_current_weights_before_its_first_sample(late: Any) -> None:
    async def scenario() -> None:
        samplers = late(1.0)
        await samplers.pool.ready(1)
        for version in (7, 8):
            await samplers.load(published(version))
        asked: list[Batch] = []
        chunks: list[Chunk] = []
        while len({chunk.seconds for chunk in chunks}) < 2:  # which shows the process
            more = batches_of(1, [len(asked)], 8)
            chunks += [chunk for (chunk,) in await asyncio.gather(*map(samplers.sample, more))]
            asked += more
        images = [(await chunk.images)[0] for chunk in chunks]
        noises = [request.noises[0] for (request,) in asked]
        assert [image[:2].tolist() for image in images] == [[n.initial % 251, n.path % 251] for n in noises]
        assert {image[2] for image in images} == {18.0}
        assert samplers.pool.restarts == 0

    asyncio.run(asyncio.wait_for(scenario(), 60))


def published(version: int) -> Weights:
    flat = ray.put(np.full(1, 10.0 + version, dtype=np.float32))
    return Weights(id=WeightsId(version), checksums=(ray.put(f"checksum of {version}"),), parts=(flat,))


def test_a_restarted_sampler_gets_its_weights_before_it_samples(samplers: Samplers) -> None:
    async def scenario() -> None:
        slot = samplers.pool.slots[0]
        await samplers.pool.ready()
        await samplers.load(published(7))
        before = await sampled(samplers, 3, version=7)
        os.kill((await call(slot, "ping", deadline=60))[0], signal.SIGKILL)
        assert (await sampled(samplers, 3, version=7)).tolist() == before.tolist()
        assert before[:, 2].tolist() == [17.0] * 4
        assert samplers.pool.restarts == 1
        assert slot.holds == WeightsId(7)

    asyncio.run(scenario())


def test_a_group_is_sampled_under_the_version_it_was_admitted_with(samplers: Samplers) -> None:
    async def scenario() -> None:
        await samplers.pool.ready()
        for version in (4, 5):
            await samplers.load(published(version))
        assert (await sampled(samplers, 0, version=4))[0, 2] == 14.0
        fresh = await sampled(samplers, 0, version=5)
        assert fresh[0, 2] == 15.0
        averaged = Weights(
            id=WeightsId(5, averaged=True),
            checksums=(ray.put("averaged"),),
            parts=(ray.put(np.full(1, 99.0)),),
        )
        noises = [Noise(initial=1, path=path) for path in (0, 3)]
        finite, handle = await samplers.evaluate(averaged, [PROMPT] * 2, noises)
        assert (await handle)[:, 1:].tolist() == [[5, 99.0]] * 2
        assert finite == (True, False)
        assert (await sampled(samplers, 0, version=5)).tolist() == fresh.tolist()

    asyncio.run(scenario())


def test_groups_that_do_not_fill_a_forward_pass_share_it(samplers: Samplers) -> None:
    async def scenario() -> None:
        await samplers.load(published(0))
        asked = batches_of(3, (5, 6, 7), 0)
        sizes = [[(part.group_id, len(part.noises)) for part in batch] for batch in asked]
        assert sizes == [[(5, 3)], [(5, 1), (6, 2)], [(6, 2), (7, 1)], [(7, 3)]]
        shared = Batches(asked, samplers.sample)
        for request in (oversampled(PROMPT, group, 4, seed=0) for group in (5, 6, 7)):
            chunks = await asyncio.gather(*shared.chunks(request.group_id))
            images = np.concatenate([await chunk.images for chunk in chunks])
            seeds = [[noise.initial % 251, noise.path % 251] for noise in request.noises]
            assert images[:, :2].tolist() == seeds
            assert sum(len(chunk.trajectories) for chunk in chunks) == 4
            for chunk in chunks:
                assert (await chunk.conditioning).arrays["group"] == request.group_id
                assert chunk.seconds == pytest.approx(0.1 * len(chunk.trajectories) / 3)
            finite = [good for chunk in chunks for good in chunk.finite]
            assert finite == [noise.path % 2 == 0 for noise in request.noises]

    asyncio.run(scenario())


def test_only_versions_that_may_still_be_asked_for_are_kept(samplers: Samplers) -> None:
    async def scenario() -> None:
        for version in range(5):
            await samplers.load(published(version))

    asyncio.run(scenario())
    assert sorted(samplers.published) == [3, 4]
