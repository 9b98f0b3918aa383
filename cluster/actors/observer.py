"""The actor that measures the images of every group, beside their rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from cluster.actors.actor_spec import ActorSpec
from cluster.actors.pool import Pool, Slot, call
from cluster.config.errors import PoolError
from cluster.config.settings import RunSettings
from rollout.records import Chunk


class ImageObserver:
    """A pool of a single actor that measures images."""

    def __init__(self, settings: RunSettings) -> None:
        """Start the actor."""
        node = settings.cluster.nodes.get("observer")
        spec = ActorSpec(name="observer", target="rewards.image_statistics:ImageObserver", node=node)
        self.pool = Pool(spec, 1, settings.cluster.deadline)

    async def measure(self, chunks: Sequence[Awaitable[Chunk]]) -> Mapping[str, float]:
        """Measure the images of a group; if that fails return nothing, since training needs no statistics."""
        done = await asyncio.gather(*chunks)
        images, finite = [chunk.images for chunk in done], [good for chunk in done for good in chunk.finite]

        async def work(slot: Slot) -> Any:
            return (await call(slot, "measure", finite, *images, deadline=self.pool.deadline))[0]

        try:
            statistics: Mapping[str, float] = await self.pool.run(work)
        except PoolError:
            return {}
        return statistics
