"""The stages of a step on pools of Ray actors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ObjectLostError
from ray.util.placement_group import PlacementGroup

from cluster.actors.actor_spec import reason
from cluster.actors.learner import Learner, learner_spec
from cluster.actors.observer import ImageObserver
from cluster.actors.pool import Pool
from cluster.actors.rewards import Rewards
from cluster.actors.samplers import Samplers
from cluster.actors.selector import Selector
from cluster.config.errors import DataLost
from cluster.config.settings import RunSettings
from learner.records import Update
from rewards.combine import Scores
from rollout.batches import Batch
from rollout.records import CandidateGroup, Chunk, Handle, Noise, Prompt, Weights, WeightsId
from selection.records import Selection


@dataclass(frozen=True, slots=True)
class RayStages:
    """All stages of a run on Ray, an implementation of `cluster.loop.stages.Stages`."""

    samplers: Samplers
    rewards: Rewards
    selector: Selector
    learner: Learner
    observer: ImageObserver | None

    async def sample(self, batch: Batch) -> Sequence[Chunk]:
        """Sample a batch: a chunk of each of its groups."""
        return await self.samplers.sample(batch)

    async def begin(self, batch: Batch) -> Sequence[Chunk]:
        """Draft a batch."""
        return await self.samplers.begin(batch)

    async def finish(self, batch: Batch, begun: Sequence[Handle]) -> Sequence[Chunk]:
        """Sample the other steps of partial trajectories."""
        return await self.samplers.finish(batch, begun)

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        """Score a group with every training reward, chunk by chunk as they are sampled."""
        return await self.rewards.score(prompt, chunks)

    async def measure(self, chunks: Sequence[Awaitable[Chunk]]) -> Mapping[str, float]:
        """Measure the images of a group, if the drift guard is on."""
        return await self.observer.measure(chunks) if self.observer else {}

    async def select(self, step: int, group_ids: Sequence[int], scores: Sequence[Scores]) -> Selection:
        """Keep the candidates that the learner trains on."""
        return await self.selector.select(step, group_ids, scores)

    async def update(self, step: int, selection: Selection, groups: Sequence[CandidateGroup]) -> Update:
        """Train on the kept candidates."""
        return await self.learner.update(step, selection, groups)

    async def updates(self) -> int:
        """Count the optimizer steps ever applied, also before the run was resumed."""
        return await self.learner.updates()

    async def load(self, version: int) -> None:
        """Publish the learner's weights as this version and load them into every sampler."""
        await self.samplers.load(await self.learner.publish(WeightsId(version)))

    async def averaged(self, version: int) -> Weights:
        """Publish the average of the weights for an evaluation, in which paused rewards are called again."""
        self.rewards.retry_paused()
        return await self.learner.publish(WeightsId(version, averaged=True))

    async def draw(
        self, weights: Weights, prompts: Sequence[Prompt], noises: Sequence[Noise]
    ) -> tuple[tuple[bool, ...], Handle]:
        """Draw an image per prompt and noise by the ODE; return whether each is finite, and their handle."""
        return await self.samplers.evaluate(weights, prompts, noises)

    async def score_held_out(
        self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]
    ) -> Scores:
        """Score the finite images with every evaluation reward."""
        return await self.rewards.score_held_out(images, prompts, finite)

    async def fetch(self, handle: Handle) -> Any:
        """Fetch a value from the object store.

        Raises:
            DataLost: if it was lost with its node.
        """
        try:
            return await handle
        except ObjectLostError as error:
            raise DataLost(reason(error)) from error

    @property
    def saver(self) -> Learner:
        """The learner, whose state is saved in checkpoints."""
        return self.learner

    @property
    def failures(self) -> Sequence[str]:
        """The last failure of each reward that had one, except for watching rewards."""
        return self.rewards.failures

    @property
    def pools(self) -> dict[str, Pool]:
        """Every pool by its name for users; the learner's ranks are not a pool."""
        rewards = {f"reward {name}": pool.pool for name, pool in self.rewards.replicas.items()}
        watching = {"observer": self.observer.pool} if self.observer else {}
        return {"samplers": self.samplers.pool, **rewards, "selector": self.selector.pool, **watching}

    @property
    def status(self) -> Mapping[str, float]:
        """The number of actors replaced so far, and of samplers that have started."""
        replaced = sum(pool.restarts for pool in self.pools.values()) + self.learner.restarts
        return {"restarts": replaced, "samplers": len(self.samplers.pool.up)}

    def alarms(self) -> dict[str, str]:
        """Return the new outages of watching rewards, by metric."""
        return self.rewards.alarms()

    @property
    def missing(self) -> str:
        """A list of the actors that have not started yet."""
        waiting = [
            f"{name} {len(pool.up)} of {len(pool.slots)}" if len(pool.slots) > 1 else name
            for name, pool in self.pools.items()
            if len(pool.up) < len(pool.slots)
        ]
        return ", ".join(waiting if self.learner.parts else [*waiting, "learner"])

    async def ready(self) -> None:
        """Wait until enough actors have started and the learner's ranks have joined."""
        least = {self.samplers.pool: self.samplers.least}
        pools = (pool.ready(least.get(pool)) for pool in self.pools.values())
        await asyncio.gather(*pools, self.learner.begin())

    async def restart(self) -> None:
        """Restart all learner ranks, as at step 0, and forget all published weights."""
        self.samplers.forget()
        await self.learner.restart()


def start_stages(settings: RunSettings, learners: PlacementGroup | None = None) -> RayStages:
    """Start every actor of a run in parallel, the learner's ranks in their placement group."""
    observer = None if settings.guard.action == "off" else ImageObserver(settings)
    learner = Learner(settings, learner_spec(settings, learners))
    # Samplers before rewards: the smallest shares fill GPU after GPU, and would leave a sampler without one.
    return RayStages(Samplers(settings), Rewards(settings), Selector(settings), learner, observer)
