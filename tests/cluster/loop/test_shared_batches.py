"""Batches that groups share: each is sampled once, and again only after a loss."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from cluster.loop.shared_batches import Batches
from rollout.batches import Batch
from rollout.records import Chunk, Noise, Prompt, SampleRequest

PROMPT = Prompt(index=0, text="a red bus")


def part(group: int, *numbers: int) -> SampleRequest:
    noises = tuple(Noise(initial=number, path=number) for number in numbers)
    return SampleRequest(group_id=group, prompt=PROMPT, noises=noises, version=0)


SHARED: Sequence[Batch] = ((part(5, 0, 1, 2),), (part(5, 3), part(6, 4, 5)), (part(6, 6, 7),))


class Sampler:
    """Sample batches, and record them."""

    def __init__(self) -> None:
        self.asked: list[Batch] = []

    async def sample(self, batch: Batch) -> list[Chunk]:
        self.asked.append(batch)
        await asyncio.sleep(0)
        return [
            Chunk(images=None, finite=(), conditioning=one.group_id, trajectories=one.noises, seconds=0.1)
            for one in batch
        ]


async def seen(batches: Batches, group: int) -> list[int]:
    chunks = await asyncio.gather(*batches.chunks(group))
    assert {chunk.conditioning for chunk in chunks} == {group}
    return [noise.initial for chunk in chunks for noise in chunk.trajectories]


def test_a_shared_batch_is_sampled_once() -> None:
    async def scenario() -> None:
        sampler = Sampler()
        batches = Batches(SHARED, sampler.sample)
        assert await asyncio.gather(seen(batches, 5), seen(batches, 6)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert sampler.asked == list(SHARED)

    asyncio.run(scenario())


def test_a_group_that_lost_its_candidates_gets_them_from_the_same_batches() -> None:
    async def scenario() -> None:
        sampler = Sampler()
        batches = Batches(SHARED, sampler.sample)
        await asyncio.gather(seen(batches, 5), seen(batches, 6))
        batches.lose(6)
        assert await seen(batches, 6) == [4, 5, 6, 7]
        assert sampler.asked == [*SHARED, *SHARED[1:]]

    asyncio.run(scenario())


def test_a_batch_that_fails_fails_for_all_its_groups() -> None:
    async def fail(batch: Batch) -> list[Chunk]:
        raise LookupError("the pool is empty")

    async def scenario() -> None:
        batches = Batches(SHARED, fail)
        for group in (5, 6):
            with pytest.raises(LookupError, match="the pool is empty"):
                await seen(batches, group)

    asyncio.run(scenario())
