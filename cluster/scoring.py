"""The reward stage: every reward of every candidate, begun as soon as the first candidates are there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence

from cluster.pools import Pool
from cluster.settings import RunSettings
from cluster.shards import Shards, Span
from rewards.combine import Scores, combine
from rewards.scorer import Judgement, join
from rewards.settings import Combination
from rewards.table import resolve
from rollout.records import Chunk, Handle, Prompt


class Rewards:
    """The shards of every reward; what no attempt could score is missing, never zero."""

    def __init__(self, settings: RunSettings) -> None:
        """Start the shards of all training and evaluation rewards, each reward once."""
        self.shards = {
            name: Shards(
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
        return [shards.pool for shards in self.shards.values()]

    @property
    def failures(self) -> list[str]:
        """The last failure of every reward that had one and does not only watch."""
        return [shards.failure for shards in self.shards.values() if shards.failure and not shards.outage]

    def alarms(self) -> dict[str, str]:
        """The rewards that only watch and have stopped working since this was last asked, by metric."""
        prefix = {name: "eval" if name in self.judging else "reward" for name in self.shards}
        return {
            f"{prefix[name]}_{name}": f"is missing: {story}"
            for name, shards in self.shards.items()
            if shards.outage and (story := shards.outage.news())
        }

    def try_again(self) -> None:
        """Let rewards that only watch and rest be tried once more."""
        for shards in self.shards.values():
            if shards.outage:
                shards.outage.try_again()

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        """Every training reward of a group, chunk by chunk as they are sampled."""
        spans = [asyncio.ensure_future(_span(prompt, chunk)) for chunk in chunks]
        return await self._all(spans, self.training, self.combine)

    async def judge(self, images: Handle, prompts: Sequence[Prompt]) -> Scores:
        """Every evaluation reward of some images; the total is raw."""
        span = asyncio.get_running_loop().create_future()
        span.set_result(Span(images=images, prompts=tuple(prompts)))
        return await self._all([span], self.judging, "raw")

    async def _all(
        self, spans: Sequence[asyncio.Future[Span]], weights: Mapping[str, float], how: Combination
    ) -> Scores:
        judgements = await asyncio.gather(*(_one(self.shards[name], spans) for name in weights))
        return combine(dict(zip(weights, judgements, strict=True)), weights, how)


async def _span(prompt: Prompt, chunk: Awaitable[Chunk]) -> Span:
    sampled = await chunk
    return Span(images=sampled.images, prompts=(prompt,) * len(sampled.trajectories))


async def _one(shards: Shards, spans: Iterable[asyncio.Future[Span]]) -> Judgement:
    if shards.groupwise:
        return await shards.judge(await asyncio.gather(*spans))
    return join(await asyncio.gather(*(_judged(shards, span) for span in spans)))


async def _judged(shards: Shards, span: asyncio.Future[Span]) -> Judgement:
    return await shards.judge([await span])
