"""The reward stage: every reward of every candidate, begun as soon as the first candidates are there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence

from cluster.actors.pool import Pool
from cluster.actors.reward_pool import Shards, Span, spans_of
from cluster.config.settings import RunSettings
from rewards.combine import Scores, combine
from rewards.registry import resolve
from rewards.scorer import Judgement, join, missing, spread
from rewards.settings import Combination
from rollout.records import Chunk, Handle, Prompt

Seen = tuple[Sequence[Span], Sequence[bool]]
"""The images that may be judged, and of all images whether they may."""


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
        seen = [asyncio.ensure_future(_seen(prompt, chunk)) for chunk in chunks]
        return await self._all(seen, self.training, self.combine)

    async def judge(self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]) -> Scores:
        """Every evaluation reward of some images, those that are finite; the total is raw."""
        seen = asyncio.get_running_loop().create_future()
        seen.set_result((spans_of(images, prompts, finite), finite))
        return await self._all([seen], self.judging, "raw")

    async def _all(
        self, seen: Sequence[asyncio.Future[Seen]], weights: Mapping[str, float], how: Combination
    ) -> Scores:
        judgements = await asyncio.gather(*(_one(self.shards[name], seen) for name in weights))
        return combine(dict(zip(weights, judgements, strict=True)), weights, how)


async def _seen(prompt: Prompt, chunk: Awaitable[Chunk]) -> Seen:
    sampled = await chunk
    return spans_of(sampled.images, [prompt] * len(sampled.finite), sampled.finite), sampled.finite


async def _one(shards: Shards, seen: Iterable[asyncio.Future[Seen]]) -> Judgement:
    if shards.groupwise:
        return await _judged(shards, *seen)
    return join(await asyncio.gather(*(_judged(shards, one) for one in seen)))


async def _judged(shards: Shards, *seen: asyncio.Future[Seen]) -> Judgement:
    """What a reward says of images that are finite; it never sees the others, which are missing."""
    done = await asyncio.gather(*seen)
    spans = [span for spans, _ in done for span in spans]
    judgement = await shards.judge(spans) if spans else missing(0)
    return spread(judgement, [one for _, finite in done for one in finite])
