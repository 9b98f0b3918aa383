"""Cut the images of a step into the calls of a reward, and put its answers together again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, Protocol

from rewards.combine import Scores, combine
from rewards.scorer import Judgement, join, missing, spread
from rewards.settings import Combination
from rollout.records import Chunk, Handle, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Images from ``start`` on of those behind a handle: as many as there are prompts."""

    images: Handle
    prompts: tuple[Prompt, ...]
    start: int = 0

    def split(self, size: int) -> list[Span]:
        """Cut the same images into spans of at most ``size``."""
        return [
            Span(images=self.images, prompts=self.prompts[i : i + size], start=self.start + i)
            for i in range(0, len(self.prompts), size)
        ]


@dataclass(frozen=True, slots=True)
class Seen:
    """Images that a reward may look at, and of all images whether they are finite and so among these."""

    spans: Sequence[Span]
    finite: Sequence[bool]

    @classmethod
    def of(cls, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]) -> Seen:
        """Take the finite images behind a handle: one span if all are."""
        runs = [(good, list(places)) for good, places in groupby(range(len(finite)), key=finite.__getitem__)]
        spans = [
            Span(images=images, prompts=tuple(prompts[i] for i in places), start=places[0])
            for good, places in runs
            if good
        ]
        return cls(spans, finite)


class Judge(Protocol):
    """One reward, wherever it runs; a ``groupwise`` one gets each group whole, in a call of its own."""

    @property
    def groupwise(self) -> bool:
        """True if candidates are scored against each other."""
        ...

    async def score(self, spans: Sequence[Span]) -> Judgement:
        """Score spans, in their order."""
        ...


def calls(spans: Sequence[Span], size: int, *, groupwise: bool) -> list[Sequence[Span]]:
    """Cut spans into the calls of a reward, of at most ``size`` images unless it is groupwise.

    A function of what was sampled together, not of time or of the number of replicas, so that a model whose
    last bits depend on the batch gives the same bits again.
    """
    if groupwise:
        return [spans]
    return [[piece] for piece in chain.from_iterable(span.split(size) for span in spans)]


def arguments(spans: Sequence[Span]) -> tuple[Any, ...]:
    """List the arguments of `rewards.worker.RewardWorker.score_ranges` for one call."""
    ranges = [(span.start, span.start + len(span.prompts)) for span in spans]
    prompts = [prompt for span in spans for prompt in span.prompts]
    return ranges, prompts, *(span.images for span in spans)


async def seen_of(prompt: Prompt, chunk: Awaitable[Chunk]) -> Seen:
    """Wait for a chunk of a prompt's candidates."""
    sampled = await chunk
    return Seen.of(sampled.images, [prompt] * len(sampled.finite), sampled.finite)


async def score_all(
    judges: Mapping[str, Judge],
    weights: Mapping[str, float],
    seen: Sequence[asyncio.Future[Seen]],
    how: Combination,
) -> Scores:
    """Score images with every reward that has a weight, part by part as they are there, and combine."""
    judgements = await asyncio.gather(*(_score_one(judges[name], seen) for name in weights))
    return combine(dict(zip(weights, judgements, strict=True)), weights, how)


async def _score_one(judge: Judge, seen: Sequence[asyncio.Future[Seen]]) -> Judgement:
    if judge.groupwise:
        return await _score_seen(judge, *seen)
    return join(await asyncio.gather(*(_score_seen(judge, one) for one in seen)))


async def _score_seen(judge: Judge, *seen: asyncio.Future[Seen]) -> Judgement:
    """Score the finite images; a reward never sees the others, whose scores are missing."""
    done = await asyncio.gather(*seen)
    spans = [span for one in done for span in one.spans]
    judgement = await judge.score(spans) if spans else missing(0)
    return spread(judgement, [good for one in done for good in one.finite])
