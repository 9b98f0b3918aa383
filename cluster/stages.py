"""The stages of the loop over pools of actors: samplers, rewards, selector and learner."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from ray.exceptions import RayTaskError

from cluster.placement import Role, spawn
from cluster.pools import LOST, Pool, PoolError, Slot, call, reason
from cluster.settings import RewardSettings, RunSettings
from learner.batch import shares
from rewards.combine import Scores, combine
from rewards.scorer import Judgement
from rollout.noise import candidate_noises
from rollout.records import CandidateGroup, Handle, Noise, Prompt, SampleRequest, Weights
from selection.records import Selection

UPDATE_DEADLINE: Final = 3600.0


class Rollouts:
    """The pool of samplers, and the published weights of every version that may still be asked for."""

    def __init__(self, settings: RunSettings) -> None:
        """Start the samplers."""
        rollout = settings.rollout
        arguments = {"model": settings.model, "rollout": rollout, "seed": settings.seed}
        role = Role(
            name="rollout", target="rollout.worker:RolloutWorker", arguments=arguments,
            gpus=rollout.gpus, threads=rollout.threads,
        )  # fmt: skip
        self.pool = Pool(role, rollout.workers, settings.cluster.deadline)
        self.candidates, self.seed = settings.selection.candidates, settings.seed
        self.kept_versions = settings.max_staleness + 2
        self.published: dict[int, Weights] = {}

    async def load(self, weights: Weights) -> None:
        """Publish weights and wait until every sampler has acknowledged them, after its older samples."""
        self.published[weights.version] = weights
        for version in sorted(self.published)[: -self.kept_versions]:
            del self.published[version]
        await asyncio.gather(*(self._push(slot, weights) for slot in self.pool.slots))

    async def _push(self, slot: Slot, weights: Weights) -> None:
        await self.pool.run(lambda found: self._ensure(found, weights), on=slot)

    async def _ensure(self, slot: Slot, weights: Weights) -> None:
        """Load weights unless the sampler holds them: after a restart or an evaluation it may not."""
        if slot.holds == weights.checksum:
            return
        slot.holds = ""
        await call(slot, "load", weights, weights.flat, deadline=self.pool.deadline)
        slot.holds = weights.checksum

    async def sample(self, prompt: Prompt, group_id: int, *, version: int) -> CandidateGroup:
        """Oversample one prompt's noise under a policy version; the same seeds on every attempt."""
        noises = candidate_noises(self.seed, prompt.index, group_id, self.candidates)
        request = SampleRequest(group_id=group_id, prompt=prompt, noises=noises, version=version)

        async def work(slot: Slot) -> list[Any]:
            await self._ensure(slot, self.published[version])
            return await call(slot, "sample", request, returns=3 + len(noises), deadline=self.pool.deadline)

        seconds, images, conditioning, *trajectories = await self.pool.run(work)
        return CandidateGroup(
            group_id=group_id, prompt=prompt, version=version, noises=noises, seconds=seconds,
            images=images, conditioning=conditioning, trajectories=tuple(trajectories),
        )  # fmt: skip

    async def evaluate(self, prompts: Sequence[Prompt], noises: Sequence[Noise], weights: Weights) -> Handle:
        """A handle of ODE images, one per prompt and noise, under the given (averaged) weights."""

        async def work(slot: Slot) -> list[Any]:
            await self._ensure(slot, weights)
            return await call(slot, "evaluate", prompts, noises, returns=2, deadline=self.pool.deadline)

        return (await self.pool.run(work))[1]


class Rewards:
    """A pool of shards per reward; what no attempt could score is missing, never zero."""

    def __init__(self, settings: RunSettings) -> None:
        """Start the shards of all training and evaluation rewards, each reward once."""
        listed = {reward.name: reward for reward in (*settings.judges, *settings.rewards)}
        self.pools = {name: _reward_pool(reward) for name, reward in listed.items()}
        self.training = {reward.name: reward.weight for reward in settings.rewards}
        self.judging = {reward.name: reward.weight for reward in settings.judges}
        self.failures: dict[str, str] = {}

    async def score(self, group: CandidateGroup) -> Scores:
        """Every training reward of a group, in parallel."""
        prompts = [group.prompt] * len(group.noises)
        return await self._all(group.images, prompts, self.training)

    async def judge(self, images: Handle, prompts: Sequence[Prompt]) -> Scores:
        """Every evaluation reward of some images, in parallel."""
        return await self._all(images, prompts, self.judging)

    async def _all(self, images: Handle, prompts: Sequence[Prompt], weights: Mapping[str, float]) -> Scores:
        judgements = await asyncio.gather(*(self._one(name, images, prompts) for name in weights))
        return combine(dict(zip(weights, judgements, strict=True)), weights)

    async def _one(self, name: str, images: Handle, prompts: Sequence[Prompt]) -> Judgement:
        pool = self.pools[name]

        async def work(slot: Slot) -> Any:
            return (await call(slot, "score", images, list(prompts), deadline=pool.deadline))[0]

        try:
            judgement: Judgement = await pool.run(work)
        except PoolError as error:
            self.failures[name] = str(error)
            missing = np.zeros(len(prompts), dtype=bool)
            return Judgement(values=np.full(len(prompts), np.nan), valid=missing)
        return judgement


def _reward_pool(reward: RewardSettings) -> Pool:
    arguments = {"name": reward.name, "options": reward.options}
    role = Role(name=reward.name, target="rewards.worker:RewardWorker", arguments=arguments, gpus=reward.gpus)
    return Pool(role, reward.workers, reward.deadline)


class Selector:
    """The selection actor."""

    def __init__(self, settings: RunSettings) -> None:
        """Start the actor."""
        arguments = {"settings": settings.selection, "seed": settings.seed}
        role = Role(name="selector", target="selection.selector:Selector", arguments=arguments)
        self.pool = Pool(role, 1, settings.cluster.deadline)

    async def select(self, step: int, group_ids: Sequence[int], scores: Sequence[Scores]) -> Selection:
        """Keep the candidates that the learner trains on."""

        async def work(slot: Slot) -> Any:
            found = await call(slot, "select", step, group_ids, scores, deadline=self.pool.deadline)
            return found[0]

        selection: Selection = await self.pool.run(work)
        return selection


class LearnerError(RuntimeError):
    """A learner rank failed; ranks live and die together, so the run resumes from its last checkpoint."""


class Learner:
    """The learner ranks, called together: every collective method runs on all of them."""

    def __init__(self, settings: RunSettings) -> None:
        """Start the ranks."""
        learner = settings.learner
        arguments = {
            "model": settings.model, "rollout": settings.rollout, "learner": learner, "seed": settings.seed,
        }  # fmt: skip
        role = Role(
            name="learner", target="learner.worker:LearnerWorker", arguments=arguments,
            gpus=learner.gpus, threads=learner.threads,
        )  # fmt: skip
        self.settings, self.seed = learner, settings.seed
        self.actors = [spawn(role, rank) for rank in range(learner.ranks)]

    async def join(self) -> None:
        """Form the process group at the first rank's address."""
        try:
            address, port = await self.actors[0].address.remote()
        except LOST as error:
            raise LearnerError(f"learner could not start: {reason(error)}") from error
        if len(self.actors) == 1:
            address = "127.0.0.1"
        world = len(self.actors)
        await self._every("join", [(rank, world, address, port) for rank in range(world)])

    async def update(
        self, step: int, selection: Selection, groups: Sequence[CandidateGroup]
    ) -> dict[str, float]:
        """One batch of FlowGRPO on the kept trajectories; returns the metrics."""
        ranks = len(self.actors)
        plan = shares(selection.kept, ranks=ranks, updates=self.settings.updates, seed=self.seed, step=step)
        by_id = {group.group_id: group for group in groups}
        calls = []
        for mine in plan:
            owners = sorted({item.group_id for share in mine for item in share})
            numbers = sorted({item.trajectory for share in mine for item in share})
            kept = [selection.kept[number] for number in numbers]
            handles = [by_id[k.group_id].trajectories[k.candidate] for k in kept]
            calls.append((mine, owners, *(by_id[g].conditioning for g in owners), *handles))
        metrics: dict[str, float] = (await self._every("update", calls))[0]
        return metrics

    async def publish(self, version: int, *, averaged: bool = False) -> Weights:
        """The weights of all ranks as one object of the store; averaged ones are marked by their version."""
        actor: Any = self.actors[0]
        digest, flat = actor.call.options(num_returns=2).remote("publish", averaged)
        return Weights(version=-1 - version if averaged else version, checksum=await digest, flat=flat)

    async def save(self, folder: str) -> None:
        """Every rank writes its share of a checkpoint."""
        await self._every("save", [(folder,)] * len(self.actors))

    async def restore(self, folder: str) -> None:
        """Every rank reads its share of a checkpoint."""
        await self._every("restore", [(folder,)] * len(self.actors))

    async def _every(self, method: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        refs: list[Any] = [
            actor.call.remote(method, *arguments) for actor, arguments in zip(self.actors, calls, strict=True)
        ]
        waits = [asyncio.wait_for(asyncio.wrap_future(ref.future()), UPDATE_DEADLINE) for ref in refs]
        try:
            return list(await asyncio.gather(*waits))
        except (*LOST, RayTaskError) as error:
            raise LearnerError(f"learner {method}: {reason(error)}") from error


@dataclass(frozen=True, slots=True)
class Stages:
    """All stages of a run."""

    rollouts: Rollouts
    rewards: Rewards
    selector: Selector
    learner: Learner

    @property
    def restarts(self) -> int:
        """How many actors had to be replaced so far."""
        pools = [self.rollouts.pool, *self.rewards.pools.values(), self.selector.pool]
        return sum(pool.restarts for pool in pools)

    async def ready(self) -> None:
        """Wait until every actor is up and the learner's ranks have found each other."""
        pools = [self.rollouts.pool, *self.rewards.pools.values(), self.selector.pool]
        await asyncio.gather(*(pool.ready() for pool in pools), self.learner.join())


def start_stages(settings: RunSettings) -> Stages:
    """Start every actor of a run; they come up in parallel."""
    return Stages(Rollouts(settings), Rewards(settings), Selector(settings), Learner(settings))
