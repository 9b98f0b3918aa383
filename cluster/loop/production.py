"""Produce scored groups ahead of the learner, within the bound on staleness."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from types import TracebackType

from cluster.config.errors import DataLost
from cluster.config.settings import RunSettings
from cluster.loop.drawing import Drawing, Rounds, oversampled, screened
from cluster.loop.stages import Stages
from cluster.record.events import GROUP
from cluster.record.nonfinite import Named, broken_candidates
from rewards.combine import Scores
from rollout.prompts import prompt_at
from rollout.records import CandidateGroup, Prompt, SampleRequest, group_of


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
    """Build the request for a group's candidates, oversampled: those drafted, or those of the first round."""
    prompt = prompt_at(prompts, settings.seed, group_id)
    selection = settings.selection
    count = selection.drafts or selection.adaptive or selection.candidates
    return oversampled(prompt, group_id, count, seed=settings.seed, version=version)


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
        rounds = Rounds(self.settings, self.stages, requests)
        return [self._producers.create_task(self._produce(request, rounds)) for request in requests]

    async def _produce(self, request: SampleRequest, rounds: Rounds) -> Produced:
        """Produce one group, again from the same seeds if its images are lost before they are scored."""
        GROUP.set(request.group_id)
        try:
            return await self._once(request, rounds)
        except DataLost:
            rounds.lose(request.group_id)
            return await self._once(request, rounds)

    async def _once(self, request: SampleRequest, rounds: Rounds) -> Produced:
        if self.settings.selection.drafts:
            drawing = await screened(self.settings, self.stages, request)
        else:
            drawing = await rounds.draw(request.group_id)
        (group, sampled), (scores, scored), observed = await asyncio.gather(
            _sampled(drawing),
            _timed(drawing.scores),
            self.stages.measure(drawing.chunks),
        )
        finite = [good for chunk in drawing.chunks for good in chunk.result().finite]
        broken = [*drawing.broken, *broken_candidates(drawing.request, finite)]
        return Produced(group, scores, observed, sampled, scored, broken)


async def _timed(scoring: Awaitable[Scores]) -> tuple[Scores, float]:
    return await scoring, time.perf_counter()


async def _sampled(drawing: Drawing) -> tuple[CandidateGroup, float]:
    """Join the chunks of a group, and return the time when the last one was sampled."""
    done = await asyncio.gather(*drawing.chunks)
    return group_of(drawing.request, done, drawing.spent), time.perf_counter()
