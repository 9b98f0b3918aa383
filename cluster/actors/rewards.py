"""The reward stage: every reward of every candidate, begun as soon as the first candidates are there."""

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
    """The replicas of every reward; what no attempt could score is missing, never zero."""

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
        self.judging = {reward.name: reward.weight for reward in settings.judges}
        self.combine = settings.combine

    @property
    def pools(self) -> list[Pool]:
        """The pool of every reward."""
        return [pool.pool for pool in self.replicas.values()]

    @property
    def failures(self) -> list[str]:
        """The last failure of every reward that had one and does not only watch."""
        return [pool.failure for pool in self.replicas.values() if pool.failure and not pool.outage]

    def alarms(self) -> dict[str, str]:
        """The rewards that only watch and have stopped working since this was last asked, by metric."""
        prefix = {name: "eval" if name in self.judging else "reward" for name in self.replicas}
        return {
            f"{prefix[name]}_{name}": f"is missing: {story}"
            for name, pool in self.replicas.items()
            if pool.outage and (story := pool.outage.news())
        }

    def try_again(self) -> None:
        """Let rewards that only watch and rest be tried once more."""
        for pool in self.replicas.values():
            if pool.outage:
                pool.outage.try_again()

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        """Score a group with every training reward, chunk by chunk as they are sampled."""
        seen = [asyncio.ensure_future(seen_of(prompt, chunk)) for chunk in chunks]
        return await score_all(self.replicas, self.training, seen, self.combine)

    async def judge(self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]) -> Scores:
        """Score images that are finite with every evaluation reward; the total is raw."""
        seen = asyncio.get_running_loop().create_future()
        seen.set_result(Seen.of(images, prompts, finite))
        return await score_all(self.replicas, self.judging, [seen], "raw")
