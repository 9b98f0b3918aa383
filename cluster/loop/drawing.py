"""Draw the candidates of a group: drafted first, or in rounds, or all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from cluster.config.settings import RunSettings
from cluster.loop.shared_batches import Batches
from cluster.loop.stages import Stages
from cluster.record.held_out import joined
from cluster.record.nonfinite import Named, broken_candidates
from rewards.combine import Scores
from rollout.batches import Batch, batches
from rollout.noise import candidate_noises
from rollout.records import Chunk, Handle, Prompt, SampleRequest
from selection.rounds import allotted
from selection.selector import screen


def oversampled(prompt: Prompt, group_id: int, count: int, *, seed: int, version: int = 0) -> SampleRequest:
    """Build the request for ``count`` candidates of a prompt, each with its own noise."""
    noises = candidate_noises(seed, prompt.index, group_id, count)
    return SampleRequest(group_id=group_id, prompt=prompt, noises=noises, version=version)


@dataclass(frozen=True, slots=True)
class Drawing:
    """The candidates of a group that are sampled in full, after ``spent`` seconds for drafts.

    ``scores`` is what scores them. ``broken`` lists the drafts that are not finite, whose candidates were
    therefore excluded.
    """

    request: SampleRequest
    chunks: Sequence[asyncio.Future[Chunk]]
    scores: Awaitable[Scores]
    spent: float = 0.0
    broken: Sequence[Named] = ()


async def screened(settings: RunSettings, stages: Stages, request: SampleRequest) -> Drawing:
    """Draft every candidate of a group, and draw those whose drafts predict the widest margins."""
    parts = batches([request], settings.rollout)
    drafts = [asyncio.ensure_future(_only(stages.begin(part))) for part in parts]
    scores = await stages.score(request.prompt, drafts)
    done = [draft.result() for draft in drafts]
    begun = [handle for draft in done for handle in draft.trajectories]
    chosen = screen(scores, settings.selection, settings.seed, request.group_id)
    finite = [good for draft in done for good in draft.finite]
    harmless = [good or place in chosen for place, good in enumerate(finite)]
    excluded = broken_candidates(request, harmless, "draft")
    request = replace(request, noises=tuple(request.noises[i] for i in chosen))
    handles = iter([begun[i] for i in chosen])
    chunks = [
        asyncio.ensure_future(_only(_finish(settings, stages, part, handles)))
        for part in batches([request], settings.rollout)
    ]
    scoring, spent = stages.score(request.prompt, chunks), sum(draft.seconds for draft in done)
    return Drawing(request, chunks, scoring, spent, excluded)


def _finish(
    settings: RunSettings, stages: Stages, part: Batch, begun: Iterator[Handle]
) -> Awaitable[Sequence[Chunk]]:
    """Continue the paths of drafted candidates, or sample them in full after an ODE of their own."""
    if settings.rollout.draft_kind == "ode":
        return stages.sample(part)
    return stages.finish(part, tuple(islice(begun, sum(len(request.noises) for request in part))))


async def _only(chunks: Awaitable[Sequence[Chunk]]) -> Chunk:
    """Wait for the chunk of a batch of one group."""
    (chunk,) = await chunks
    return chunk


class Rounds:
    """The candidates of a step's groups, in two rounds if some are allotted by the scores of the first."""

    def __init__(self, settings: RunSettings, stages: Stages, requests: Sequence[SampleRequest]) -> None:
        """Draw the requested candidates of every group, in batches that several groups may share."""
        self.settings, self.stages = settings, stages
        self.requests = {request.group_id: request for request in requests}
        self._first = Batches(batches(requests, settings.rollout), stages.sample)
        self._second = Batches((), stages.sample)
        self._more: dict[int, SampleRequest] = {}
        self._scores: dict[int, Scores] = {}
        self._allotted = asyncio.Event()

    async def draw(self, group_id: int) -> Drawing:
        """Draw the candidates of a group; in two rounds, wait for the first of all groups."""
        request, chunks = self.requests[group_id], self._first.chunks(group_id)
        scoring = self.stages.score(request.prompt, chunks)
        if not self.settings.selection.adaptive:
            return Drawing(request, chunks, scoring)
        scores = await scoring
        await self._allot(group_id, scores)
        more = self._more.get(group_id)
        if more is None:
            return Drawing(request, chunks, _now(scores))
        rest = self._second.chunks(group_id)
        whole = replace(request, noises=request.noises + more.noises)
        return Drawing(whole, [*chunks, *rest], self._joined(request, scores, rest))

    def lose(self, group_id: int) -> None:
        """Forget a group's images, so that the next call draws the same candidates again."""
        self._first.lose(group_id)
        self._second.lose(group_id)

    async def _allot(self, group_id: int, scores: Scores) -> None:
        """Wait until the first round of every group is scored; allot the second at the last one."""
        self._scores[group_id] = scores
        if len(self._scores) == len(self.requests) and not self._allotted.is_set():
            ids = sorted(self.requests)
            counts = allotted(
                [self._scores[i] for i in ids], ids, self.settings.selection, self.settings.seed
            )
            self._more = {i: self._another(i, count) for i, count in zip(ids, counts, strict=True) if count}
            self._second = Batches(batches([*self._more.values()], self.settings.rollout), self.stages.sample)
            self._allotted.set()
        await self._allotted.wait()

    def _another(self, group_id: int, count: int) -> SampleRequest:
        """Request ``count`` candidates more of a group: those whose numbers follow."""
        request = self.requests[group_id]
        drawn = len(request.noises)
        whole = oversampled(
            request.prompt, group_id, drawn + count, seed=self.settings.seed, version=request.version
        )
        return replace(whole, noises=whole.noises[drawn:])

    async def _joined(
        self, request: SampleRequest, scores: Scores, rest: Sequence[asyncio.Future[Chunk]]
    ) -> Scores:
        return joined([scores, await self.stages.score(request.prompt, rest)])


async def _now(scores: Scores) -> Scores:
    return scores
