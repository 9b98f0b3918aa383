"""The stages of the loop over pools of actors: samplers, rewards, selector and learner."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup

from cluster.actors.actor_spec import Role
from cluster.actors.learner import Learner, settled
from cluster.actors.pool import LOST, Pool, Slot, call, reason
from cluster.actors.rewards import Rewards
from cluster.config.settings import RunSettings
from cluster.loop.drift_guard import Observer
from rewards.combine import Scores
from rollout.batches import Batch, batches
from rollout.noise import candidate_noises
from rollout.records import (
    Chunk,
    Handle,
    Noise,
    Prompt,
    SampleRequest,
    Weights,
    WeightsMismatch,
)  # fmt: skip
from selection.records import Selection


async def _made(weights: Weights, deadline: float) -> None:
    """Tell a learner that could not make its parts from a sampler that could not take them."""
    await settled("publish", weights.checksums, deadline)


class WeightsError(RuntimeError):
    """Weights did not arrive as they were sent, twice."""


class Rollouts:
    """The pool of samplers, and the published weights of every version that may still be asked for."""

    target = "rollout.worker:RolloutWorker"

    def __init__(self, settings: RunSettings) -> None:
        """Start the samplers."""
        rollout = settings.rollout
        arguments = {
            "model": settings.model, "rollout": rollout, "seed": settings.seed,
            "keep_means": settings.learner.needs_means,
        }  # fmt: skip
        role = Role(
            name="rollout", target=self.target, arguments=arguments,
            gpus=rollout.gpus, threads=rollout.threads, node=settings.cluster.nodes.get("rollout"),
        )  # fmt: skip
        self.pool = Pool(role, rollout.workers, settings.cluster.deadline)
        self.least, self.learner_deadline = rollout.min_workers, settings.cluster.learner_deadline
        self.settings, self.seed = rollout, settings.seed
        self.candidates, self.previews = settings.selection.candidates, settings.selection.previews
        self.kept_versions = settings.max_staleness + 1
        self.published: dict[int, Weights] = {}

    async def load(self, weights: Weights) -> None:
        """Publish weights and wait until every sampler has acknowledged them, after its older samples.

        One that is not there, or is lost meanwhile, gets them before its first sample.
        """
        self.published[weights.version] = weights
        for version in sorted(self.published)[: -self.kept_versions]:
            del self.published[version]
        pushes = (self._push(slot, weights) for slot in self.pool.up)
        # All of them, so that none is still under way when another's failure is dealt with.
        for failure in await asyncio.gather(*pushes, return_exceptions=True):
            if failure:
                raise failure

    async def _push(self, slot: Slot, weights: Weights) -> None:
        with suppress(*LOST):
            await self.pool.once(lambda found: self._ensure(found, weights), on=slot)

    def forget(self) -> None:
        """Trust no weights that were published so far: the versions from here on are others."""
        self.published.clear()
        for slot in self.pool.slots:
            slot.holds = ""

    async def _ensure(self, slot: Slot, weights: Weights) -> None:
        """Load weights unless the sampler holds them: after a restart or an evaluation it may not."""
        if slot.holds == str(weights.version):
            return
        slot.holds = ""
        for attempt in (1, 2):
            try:
                await self._send(slot, weights)
                break
            except (*LOST, RayTaskError) as error:
                await _made(weights, self.learner_deadline)
                if not isinstance(error, RayTaskError):
                    raise
                if attempt == 2 or not isinstance(error, WeightsMismatch):
                    raise WeightsError(
                        f"sampler {slot.number}, v{weights.version}: {reason(error)}"
                    ) from error
        slot.holds = str(weights.version)

    async def _send(self, slot: Slot, weights: Weights) -> None:
        """All parts at once: the sampler takes each in its turn, as soon as the learner has made it."""
        whole = zip(weights.checksums, weights.parts, strict=True)
        refs: list[Any] = [
            slot.actor.call.remote("load", weights.version, number, len(weights.parts), digest, flat)
            for number, (digest, flat) in enumerate(whole)
        ]
        loaded = asyncio.gather(*(asyncio.wrap_future(ref.future()) for ref in refs))
        await asyncio.wait_for(loaded, self.pool.deadline)

    def request(self, prompt: Prompt, group_id: int, *, version: int) -> SampleRequest:
        """One prompt's candidates, oversampled; with previews, all those that are begun."""
        count = self.previews or self.candidates
        noises = candidate_noises(self.seed, prompt.index, group_id, count, self.settings)
        return SampleRequest(group_id=group_id, prompt=prompt, noises=noises, version=version)

    def batches(self, requests: Sequence[SampleRequest]) -> list[Batch]:
        """The forward passes of groups, which are sampled by themselves."""
        return batches(requests, self.settings)

    async def sample(self, batch: Batch) -> list[Chunk]:
        """Sample a batch under the version it asks for: a chunk of each of its groups.

        The same seeds on every attempt.
        """
        parts = len(batch)
        made, *rest = await self._run("sample", batch, 2 * parts)
        images, conditionings, trajectories = rest[:parts], rest[parts : 2 * parts], iter(rest[2 * parts :])
        counts, finite = [len(part.noises) for part in batch], iter(made.finite)
        return [
            Chunk(
                images=images[place],
                finite=tuple(islice(finite, count)),
                conditioning=conditionings[place],
                trajectories=tuple(islice(trajectories, count)),
                seconds=made.seconds * count / sum(counts),
            )
            for place, count in enumerate(counts)
        ]

    async def begin(self, request: SampleRequest) -> Chunk:
        """Sample the first steps of a batch of a group: previews to be scored, and the begun candidates."""
        made, images, *begun = await self._run("begin", request, 1)
        return Chunk(
            images=images,
            finite=made.finite,
            conditioning=None,
            trajectories=tuple(begun),
            seconds=made.seconds,
        )

    async def finish(self, request: SampleRequest, begun: Sequence[Handle]) -> Chunk:
        """Sample the other steps of as many begun candidates of a group as make a batch."""
        made, images, conditioning, *trajectories = await self._run("finish", request, 2, begun)
        return Chunk(
            images=images,
            finite=made.finite,
            conditioning=conditioning,
            trajectories=tuple(trajectories),
            seconds=made.seconds,
        )

    async def _run(
        self, method: str, asked: Batch | SampleRequest, firsts: int, begun: Sequence[Handle] = ()
    ) -> list[Any]:
        """A sampler's method: what is `Made`, then handles of ``firsts`` values and of every candidate."""
        batch = asked if isinstance(asked, tuple) else (asked,)
        returns = 1 + firsts + sum(len(part.noises) for part in batch)

        async def work(slot: Slot) -> list[Any]:
            await self._ensure(slot, self.published[batch[0].version])
            return await call(slot, method, asked, *begun, returns=returns, deadline=self.pool.deadline)

        found: list[Any] = await self.pool.run(work)
        return found

    async def evaluate(
        self, prompts: Sequence[Prompt], noises: Sequence[Noise], weights: Weights
    ) -> tuple[tuple[bool, ...], Handle]:
        """ODE images, one per prompt and noise, under the given (averaged) weights.

        Which of them are finite, and a handle of all.
        """

        async def work(slot: Slot) -> list[Any]:
            await self._ensure(slot, weights)
            return await call(slot, "evaluate", prompts, noises, returns=2, deadline=self.pool.deadline)

        finite, images = await self.pool.run(work)
        return finite, images


class Selector:
    """The selection actor."""

    def __init__(self, settings: RunSettings) -> None:
        """Start the actor."""
        arguments = {"settings": settings.selection, "seed": settings.seed}
        node, target = settings.cluster.nodes.get("selector"), "selection.selector:Selector"
        role = Role(name="selector", target=target, arguments=arguments, node=node)
        self.pool = Pool(role, 1, settings.cluster.deadline)

    async def select(self, step: int, group_ids: Sequence[int], scores: Sequence[Scores]) -> Selection:
        """Keep the candidates that the learner trains on."""

        async def work(slot: Slot) -> Any:
            found = await call(slot, "select", step, group_ids, scores, deadline=self.pool.deadline)
            return found[0]

        selection: Selection = await self.pool.run(work)
        return selection


@dataclass(frozen=True, slots=True)
class Stages:
    """All stages of a run."""

    rollouts: Rollouts
    rewards: Rewards
    selector: Selector
    learner: Learner
    observer: Observer | None

    @property
    def named_pools(self) -> dict[str, Pool]:
        """Every pool by what users call its actors; the learner is none."""
        rewards = {f"reward {name}": shards.pool for name, shards in self.rewards.shards.items()}
        watching = {"observer": self.observer.pool} if self.observer else {}
        return {"samplers": self.rollouts.pool, **rewards, "selector": self.selector.pool, **watching}

    @property
    def pools(self) -> list[Pool]:
        """Every pool."""
        return list(self.named_pools.values())

    @property
    def restarts(self) -> int:
        """How many actors had to be replaced so far."""
        return sum(pool.restarts for pool in self.pools) + self.learner.restarts

    @property
    def samplers(self) -> int:
        """How many samplers are at work."""
        return len(self.rollouts.pool.up)

    @property
    def missing(self) -> str:
        """Which actors have not started yet, in words."""
        found = [
            f"{name} {len(pool.up)} of {len(pool.slots)}" if len(pool.slots) > 1 else name
            for name, pool in self.named_pools.items()
            if len(pool.up) < len(pool.slots)
        ]
        return ", ".join(found if self.learner.parts else [*found, "learner"])

    async def ready(self) -> None:
        """Wait until enough actors are up and the learner's ranks have found each other."""
        least = {self.rollouts.pool: self.rollouts.least}
        pools = (pool.ready(least.get(pool)) for pool in self.pools)
        await asyncio.gather(*pools, self.learner.begin())


def start_stages(settings: RunSettings, learners: PlacementGroup | None = None) -> Stages:
    """Start every actor of a run, the learner's in their places; they come up in parallel."""
    observer = None if settings.guard.action == "off" else Observer(settings)
    learner = Learner(settings, learners)
    return Stages(Rollouts(settings), Rewards(settings), Selector(settings), learner, observer)
