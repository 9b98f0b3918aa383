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
    """A pool of the one actor that measures images."""

    def __init__(self, settings: RunSettings) -> None:
        """Start the actor."""
        node = settings.cluster.nodes.get("observer")
        spec = ActorSpec(name="observer", target="rewards.image_statistics:ImageObserver", node=node)
        self.pool = Pool(spec, 1, settings.cluster.deadline)

    async def measure(self, chunks: Sequence[Awaitable[Chunk]]) -> Mapping[str, float]:
        """Measure the images of a group; nothing if that fails, since training needs no statistics."""
        done = await asyncio.gather(*chunks)
        images, finite = [chunk.images for chunk in done], [one for chunk in done for one in chunk.finite]

        async def work(slot: Slot) -> Any:
            return (await call(slot, "measure", finite, *images, deadline=self.pool.deadline))[0]

        try:
            found: Mapping[str, float] = await self.pool.run(work)
        except PoolError:
            return {}
        return found
