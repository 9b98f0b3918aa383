"""The reward stage: every reward of every candidate, computed chunk by chunk as candidates are sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

from cluster.actors.pool import Pool
from cluster.actors.reward_pool import RewardPool
from cluster.config.settings import RunSettings
from rewards.combine import Scores
from rewards.registry import resolve
from rewards.spans import Seen, score_all, seen_of
from rollout.records import Chunk, Handle, Prompt


class Rewards:
    """The replicas of every reward; scores that no attempt could compute are missing, never zero."""

    def __init__(self, settings: RunSettings) -> None:
        """Start the replicas of all training and evaluation rewards, each reward once."""
        self.replicas = {
            name: RewardPool(
                reward,
                groupwise=resolve(reward.target).traits.groupwise,
                node=settings.cluster.nodes.get(name),
                watches=name in settings.watching,
            )
            for name, reward in settings.distinct_rewards.items()
        }
        self.training = {reward.name: reward.weight for reward in settings.rewards}
        self.evaluation = {reward.name: reward.weight for reward in settings.eval_rewards_used}
        self.combine = settings.combine

    @property
    def pools(self) -> list[Pool]:
        """The pool of every reward."""
        return [pool.pool for pool in self.replicas.values()]

    @property
    def failures(self) -> list[str]:
        """The last failure of each reward that had one, except for watching rewards."""
        return [pool.failure for pool in self.replicas.values() if pool.failure and not pool.outage]

    def alarms(self) -> dict[str, str]:
        """Return the new outages of watching rewards, by metric."""
        prefix = {name: "eval" if name in self.evaluation else "reward" for name in self.replicas}
        return {
            f"{prefix[name]}_{name}": f"is missing: {reason}"
            for name, pool in self.replicas.items()
            if pool.outage and (reason := pool.outage.new_reason())
        }

    def retry_paused(self) -> None:
        """Allow the next call of watching rewards that are paused."""
        for pool in self.replicas.values():
            if pool.outage:
                pool.outage.retry()

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        """Score a group with every training reward, chunk by chunk as they are sampled."""
        seen = [asyncio.ensure_future(seen_of(prompt, chunk)) for chunk in chunks]
        return await score_all(self.replicas, self.training, seen, self.combine)

    async def score_held_out(
        self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]
    ) -> Scores:
        """Score the finite images with every evaluation reward; the total is raw."""
        seen = asyncio.get_running_loop().create_future()
        seen.set_result(Seen.of(images, prompts, finite))
        return await score_all(self.replicas, self.evaluation, [seen], "raw")
