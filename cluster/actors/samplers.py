"""The pool of samplers, and the published weights of every version that may still be sampled with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from ray.exceptions import RayTaskError

from cluster.actors.actor_spec import LOST, ActorSpec, reason
from cluster.actors.learner import gather_ranks
from cluster.actors.pool import Pool, Slot, call
from cluster.config.errors import WeightsError
from cluster.config.settings import RunSettings
from learner.objectives.registry import load_objective
from rollout import wire
from rollout.batches import Batch
from rollout.records import Chunk, Handle, Noise, Prompt, Weights, WeightsId, WeightsMismatch

SAMPLER: Final = "rollout.worker:RolloutWorker"


def sampler_spec(settings: RunSettings) -> ActorSpec:
    """Describe the sampler actors of a run."""
    rollout = settings.rollout
    return ActorSpec(
        name="rollout",
        target=SAMPLER,
        arguments={
            "model": settings.model,
            "rollout": rollout,
            "seed": settings.seed,
            "keeps": load_objective(settings.learner.objective).keeps,
        },
        gpus=rollout.gpus,
        threads=rollout.threads,
        node=settings.cluster.nodes.get("rollout"),
    )


class Samplers:
    """The samplers; each loads the weights that its work needs before it starts."""

    def __init__(self, settings: RunSettings, spec: ActorSpec | None = None) -> None:
        """Start the samplers of `sampler_spec`, or those of another spec with the same interface."""
        self.pool = Pool(spec or sampler_spec(settings), settings.rollout.workers, settings.cluster.deadline)
        self.least = settings.rollout.min_workers
        self.learner_deadline = settings.cluster.learner_deadline
        self.kept_versions = settings.max_staleness + 1
        self.published: dict[int, Weights] = {}

    async def load(self, weights: Weights) -> None:
        """Publish weights and wait until every sampler has acknowledged them, after its earlier work.

        A sampler that is missing or fails now receives the weights before its next sample.
        """
        self.published[weights.id.version] = weights
        for version in sorted(self.published)[: -self.kept_versions]:
            del self.published[version]
        pushes = (self._push(slot, weights) for slot in self.pool.up)
        # Wait for all, so that none is still loading when another one's failure is handled.
        for failure in await asyncio.gather(*pushes, return_exceptions=True):
            if failure:
                raise failure

    async def _push(self, slot: Slot, weights: Weights) -> None:
        with suppress(*LOST):
            await self.pool.once(lambda free: self._ensure(free, weights), on=slot)

    def forget(self) -> None:
        """Forget all published weights: after a rollback the same version numbers mean different weights."""
        self.published.clear()
        for slot in self.pool.slots:
            slot.holds = None

    async def _ensure(self, slot: Slot, weights: Weights) -> None:
        """Load weights unless the sampler has them: after a restart or an evaluation it may not."""
        if slot.holds == weights.id:
            return
        slot.holds = None
        for attempt in (1, 2):
            try:
                await self._send(slot, weights)
                break
            except (*LOST, RayTaskError) as error:
                await _check_published(weights, self.learner_deadline)
                if not isinstance(error, RayTaskError):
                    raise
                if attempt == 2 or not isinstance(error, WeightsMismatch):
                    raise WeightsError(f"sampler {slot.number}, {weights.id}: {reason(error)}") from error
        slot.holds = weights.id

    async def _send(self, slot: Slot, weights: Weights) -> None:
        """Send all parts at once; the sampler loads each in order, once the learner has produced it."""
        whole = zip(weights.checksums, weights.parts, strict=True)
        refs: list[Any] = [
            slot.actor.call.remote("load", weights.id, number, len(weights.parts), digest, flat)
            for number, (digest, flat) in enumerate(whole)
        ]
        loaded = asyncio.gather(*(asyncio.wrap_future(ref.future()) for ref in refs))
        await asyncio.wait_for(loaded, self.pool.deadline)

    async def sample(self, batch: Batch) -> list[Chunk]:
        """Sample a batch with the policy version that it names, from the same seeds on every attempt."""
        return await self._run("sample", batch)

    async def begin(self, batch: Batch) -> list[Chunk]:
        """Draft a batch: images, and the partial trajectories unless a draft has an ODE of its own."""
        return await self._run("begin", batch)

    async def finish(self, batch: Batch, begun: Sequence[Handle]) -> list[Chunk]:
        """Sample the other steps of the batch's partial trajectories."""
        return await self._run("finish", batch, begun)

    async def _run(self, method: str, batch: Batch, begun: Sequence[Handle] = ()) -> list[Chunk]:
        deadline = self.pool.deadline

        async def work(slot: Slot) -> list[Any]:
            await self._ensure(slot, self.published[batch[0].version])
            returns = wire.returns(batch)
            return await call(
                slot, method, batch, *begun, returns=returns, spread=wire.spread, deadline=deadline
            )

        return wire.gather(await self.pool.run(work))

    async def evaluate(
        self, weights: Weights, prompts: Sequence[Prompt], noises: Sequence[Noise]
    ) -> tuple[tuple[bool, ...], Handle]:
        """Sample an image per prompt and noise by the ODE, with the given (averaged) weights.

        Returns:
            For each image whether it is finite, and a handle of all images.
        """

        async def work(slot: Slot) -> list[Any]:
            await self._ensure(slot, weights)
            return await call(slot, "evaluate", prompts, noises, returns=2, deadline=self.pool.deadline)

        finite, images = await self.pool.run(work)
        return finite, images

    @property
    def held(self) -> dict[int, WeightsId]:
        """The weights of each sampler, by its number."""
        return {slot.number: slot.holds for slot in self.pool.slots if slot.holds}


async def _check_published(weights: Weights, deadline: float) -> None:
    """Raise a learner failure if it was the learner that failed, unable to produce the weights."""
    await gather_ranks("publish", weights.checksums, deadline)
