"""The stages of a step over pools of actors on Ray."""

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
    """All stages of a run, as `cluster.loop.stages.Stages` wants them."""

    samplers: Samplers
    rewards: Rewards
    selector: Selector
    learner: Learner
    observer: ImageObserver | None

    async def sample(self, batch: Batch) -> Sequence[Chunk]:
        """Sample a batch: a chunk of each of its groups."""
        return await self.samplers.sample(batch)

    async def begin(self, batch: Batch) -> Sequence[Chunk]:
        """Sample the first steps of a batch."""
        return await self.samplers.begin(batch)

    async def finish(self, batch: Batch, begun: Sequence[Handle]) -> Sequence[Chunk]:
        """Sample the other steps of candidates that were begun."""
        return await self.samplers.finish(batch, begun)

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        """Score a group with every training reward, chunk by chunk as they are sampled."""
        return await self.rewards.score(prompt, chunks)

    async def measure(self, chunks: Sequence[Awaitable[Chunk]]) -> Mapping[str, float]:
        """Measure the images of a group, if somebody watches them."""
        return await self.observer.measure(chunks) if self.observer else {}

    async def select(self, step: int, group_ids: Sequence[int], scores: Sequence[Scores]) -> Selection:
        """Keep the candidates that the learner trains on."""
        return await self.selector.select(step, group_ids, scores)

    async def update(self, step: int, selection: Selection, groups: Sequence[CandidateGroup]) -> Update:
        """Train on the kept candidates."""
        return await self.learner.update(step, selection, groups)

    async def updates(self) -> int:
        """Count the optimizer steps that were ever applied, also before the run was resumed."""
        return await self.learner.updates()

    async def load(self, version: int) -> None:
        """Publish the learner's weights as this version and load them into every sampler."""
        await self.samplers.load(await self.learner.publish(WeightsId(version)))

    async def averaged(self, version: int) -> Weights:
        """Publish the average of the weights for an evaluation, and let resting rewards be tried again."""
        self.rewards.try_again()
        return await self.learner.publish(WeightsId(version, averaged=True))

    async def draw(
        self, weights: Weights, prompts: Sequence[Prompt], noises: Sequence[Noise]
    ) -> tuple[tuple[bool, ...], Handle]:
        """Draw an image for every prompt and noise by the ODE: which are finite, and a handle of all."""
        return await self.samplers.evaluate(weights, prompts, noises)

    async def judge(self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]) -> Scores:
        """Score images that are finite with every evaluation reward."""
        return await self.rewards.judge(images, prompts, finite)

    async def fetch(self, handle: Handle) -> Any:
        """Bring a value here.

        Raises:
            DataLost: if it was on a node that is gone.
        """
        try:
            return await handle
        except ObjectLostError as error:
            raise DataLost(reason(error)) from error

    @property
    def saver(self) -> Learner:
        """The learner, as checkpoints know it."""
        return self.learner

    @property
    def failures(self) -> Sequence[str]:
        """The last failure of every reward that had one and counts."""
        return self.rewards.failures

    @property
    def pools(self) -> dict[str, Pool]:
        """Every pool by the name that users know its actors by; the learner's ranks are not a pool."""
        rewards = {f"reward {name}": pool.pool for name, pool in self.rewards.replicas.items()}
        watching = {"observer": self.observer.pool} if self.observer else {}
        return {"samplers": self.samplers.pool, **rewards, "selector": self.selector.pool, **watching}

    @property
    def status(self) -> Mapping[str, float]:
        """The number of actors that were replaced so far, and of samplers at work."""
        replaced = sum(pool.restarts for pool in self.pools.values()) + self.learner.restarts
        return {"restarts": replaced, "samplers": len(self.samplers.pool.up)}

    def alarms(self) -> dict[str, str]:
        """Return the watching rewards that have stopped working since this was last asked, by metric."""
        return self.rewards.alarms()

    @property
    def missing(self) -> str:
        """The actors that have not started yet, in words."""
        found = [
            f"{name} {len(pool.up)} of {len(pool.slots)}" if len(pool.slots) > 1 else name
            for name, pool in self.pools.items()
            if len(pool.up) < len(pool.slots)
        ]
        return ", ".join(found if self.learner.parts else [*found, "learner"])

    async def ready(self) -> None:
        """Wait until enough actors are up and the learner's ranks have found each other."""
        least = {self.samplers.pool: self.samplers.least}
        pools = (pool.ready(least.get(pool)) for pool in self.pools.values())
        await asyncio.gather(*pools, self.learner.begin())

    async def restart(self) -> None:
        """Start all learner ranks anew, as at step 0, and forget every published weight."""
        self.samplers.forget()
        await self.learner.restart()


def start_stages(settings: RunSettings, learners: PlacementGroup | None = None) -> RayStages:
    """Start every actor of a run, the learner's in their places; they come up in parallel."""
    observer = None if settings.guard.action == "off" else ImageObserver(settings)
    learner = Learner(settings, learner_spec(settings, learners))
    return RayStages(Samplers(settings), Rewards(settings), Selector(settings), learner, observer)
