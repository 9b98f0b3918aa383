"""The selection actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.actors.actor_spec import ActorSpec
from cluster.actors.pool import Pool, Slot, call
from cluster.config.settings import RunSettings
from rewards.combine import Scores
from selection.records import Selection


class Selector:
    """A pool of a single actor that selects."""

    def __init__(self, settings: RunSettings) -> None:
        """Start the actor."""
        arguments = {"settings": settings.selection, "seed": settings.seed}
        node, target = settings.cluster.nodes.get("selector"), "selection.selector:Selector"
        spec = ActorSpec(name="selector", target=target, arguments=arguments, node=node)
        self.pool = Pool(spec, 1, settings.cluster.deadline)

    async def select(self, step: int, group_ids: Sequence[int], scores: Sequence[Scores]) -> Selection:
        """Keep the candidates that the learner trains on."""

        async def work(slot: Slot) -> Any:
            return (await call(slot, "select", step, group_ids, scores, deadline=self.pool.deadline))[0]

        selection: Selection = await self.pool.run(work)
        return selection
