"""The batches of one step, some of which several groups share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from rollout.batches import Batch
from rollout.records import Chunk


class Batches:
    """The batches in which the groups of a step are sampled; each is sampled once, at the first request."""

    def __init__(
        self, batches: Sequence[Batch], sample: Callable[[Batch], Awaitable[Sequence[Chunk]]]
    ) -> None:
        """Sample batches with ``sample``, which returns one chunk for each group of a batch."""
        self._batches, self._sample = batches, sample
        self._sampled: dict[int, asyncio.Future[Sequence[Chunk]]] = {}

    def chunks(self, group_id: int) -> list[asyncio.Future[Chunk]]:
        """Request the chunks of a group, in the order of its candidates."""
        return [asyncio.ensure_future(self._chunk(*place)) for place in self._places(group_id)]

    def lose(self, group_id: int) -> None:
        """Forget a group's batches, so that the next request samples them again, whole and thus identical."""
        for number, _ in self._places(group_id):
            self._sampled.pop(number, None)

    def _places(self, group_id: int) -> list[tuple[int, int]]:
        return [
            (number, place)
            for number, batch in enumerate(self._batches)
            for place, part in enumerate(batch)
            if part.group_id == group_id
        ]

    async def _chunk(self, number: int, place: int) -> Chunk:
        if number not in self._sampled:
            self._sampled[number] = asyncio.ensure_future(self._sample(self._batches[number]))
        return (await self._sampled[number])[place]
