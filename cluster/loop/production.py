"""Produce scored groups ahead of the learner, within the bound on staleness."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from types import TracebackType

from cluster.config.errors import DataLost
from cluster.config.settings import RunSettings
from cluster.loop.shared_batches import Batches
from cluster.loop.stages import Stages
from cluster.record.events import GROUP
from cluster.record.nonfinite import Named, broken_candidates
from rewards.combine import Scores
from rollout.batches import Batch, batches
from rollout.noise import candidate_noises
from rollout.prompts import prompt_at
from rollout.records import CandidateGroup, Chunk, Handle, Prompt, SampleRequest, group_of
from selection.selector import screen


@dataclass(frozen=True, slots=True)
class Produced:
    """A scored group, statistics of its images, and the times when it was sampled and scored.

    Times are those of `time.perf_counter`. ``broken`` lists its images that are not finite, and the drafts
    that are not, whose candidates were therefore excluded.
    """

    group: CandidateGroup
    scores: Scores
    observed: Mapping[str, float]
    sampled: float
    scored: float
    broken: Sequence[Named] = ()


GroupIds = Callable[[int], Sequence[int]]
"""A function that returns the numbers of a step's groups."""


def consecutive(settings: RunSettings) -> GroupIds:
    """Number groups consecutively, the same number in each step."""
    count = settings.groups_per_step
    return lambda step: range(step * count, (step + 1) * count)


def request_for(
    settings: RunSettings, prompts: tuple[Prompt, ...], group_id: int, version: int
) -> SampleRequest:
    """Build the request for a group's candidates, oversampled; with drafts, for all that are drafted."""
    prompt = prompt_at(prompts, settings.seed, group_id)
    count = settings.selection.drafts or settings.selection.candidates
    return oversampled(prompt, group_id, count, seed=settings.seed, version=version)


def oversampled(prompt: Prompt, group_id: int, count: int, *, seed: int, version: int = 0) -> SampleRequest:
    """Build the request for ``count`` candidates of a prompt, each with its own noise."""
    noises = candidate_noises(seed, prompt.index, group_id, count)
    return SampleRequest(group_id=group_id, prompt=prompt, noises=noises, version=version)


class Production:
    """The groups of the next steps, in production with the policy version at which each step was admitted.

    At most ``max_staleness`` steps are ahead of the one that the learner waits for. A context manager: at its
    end, groups still in production are cancelled; a failure of a producer cancels the body and is raised in
    an ``ExceptionGroup``.
    """

    def __init__(
        self, settings: RunSettings, prompts: tuple[Prompt, ...], stages: Stages, groups: GroupIds, first: int
    ) -> None:
        """Produce from step ``first`` to the last of the run."""
        self.settings, self.prompts, self.stages, self.groups = settings, prompts, stages, groups
        self._ahead = iter(range(first, settings.steps))
        self._inflight: deque[list[asyncio.Task[Produced]]] = deque()
        self._producers = asyncio.TaskGroup()

    async def __aenter__(self) -> Production:
        """Enter the group of producers."""
        await self._producers.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel the producers and wait for their end."""
        for task in chain(*self._inflight):
            task.cancel()
        await self._producers.__aexit__(kind, error, trace)

    async def next(self, version: int) -> list[Produced]:
        """Admit the steps that may now start with this policy version, and return the next step's groups."""
        for step in islice(self._ahead, self.settings.max_staleness + 1 - len(self._inflight)):
            self._inflight.append(self._admit(step, version))
        return [await group for group in self._inflight.popleft()]

    def _admit(self, step: int, version: int) -> list[asyncio.Task[Produced]]:
        """Start to produce the groups of a step, several of which may share a batch."""
        requests = [request_for(self.settings, self.prompts, group, version) for group in self.groups(step)]
        shared = Batches(batches(requests, self.settings.rollout), self.stages.sample)
        return [self._producers.create_task(self._produce(request, shared)) for request in requests]

    async def _produce(self, request: SampleRequest, shared: Batches) -> Produced:
        """Produce one group, again from the same seeds if its images are lost before they are scored."""
        GROUP.set(request.group_id)
        try:
            return await self._once(request, shared)
        except DataLost:
            shared.lose(request.group_id)
            return await self._once(request, shared)

    async def _once(self, request: SampleRequest, shared: Batches) -> Produced:
        if self.settings.selection.drafts:
            finishing = await screened(self.settings, self.stages, request)
        else:
            finishing = Finishing(request, shared.chunks(request.group_id))
        request, chunks = finishing.request, finishing.chunks
        (group, sampled), (scores, scored), observed = await asyncio.gather(
            _sampled(finishing),
            _timed(self.stages.score(request.prompt, chunks)),
            self.stages.measure(chunks),
        )
        finite = [good for chunk in chunks for good in chunk.result().finite]
        broken = [*finishing.broken, *broken_candidates(request, finite)]
        return Produced(group, scores, observed, sampled, scored, broken)


@dataclass(frozen=True, slots=True)
class Finishing:
    """The candidates of a group that are sampled to the end, after ``spent`` seconds for drafts.

    ``broken`` lists the drafts that are not finite, whose candidates were therefore excluded.
    """

    request: SampleRequest
    chunks: Sequence[asyncio.Future[Chunk]]
    spent: float = 0.0
    broken: Sequence[Named] = ()


async def screened(settings: RunSettings, stages: Stages, request: SampleRequest) -> Finishing:
    """Draft every candidate of a group, and finish those whose drafts predict the widest margins."""
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
    return Finishing(request, chunks, sum(draft.seconds for draft in done), excluded)


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


async def _timed(scoring: Awaitable[Scores]) -> tuple[Scores, float]:
    return await scoring, time.perf_counter()


async def _sampled(finishing: Finishing) -> tuple[CandidateGroup, float]:
    """Join the chunks of a group, and return the time when the last one was sampled."""
    done = await asyncio.gather(*finishing.chunks)
    return group_of(finishing.request, done, finishing.spent), time.perf_counter()
