"""The replicas of one reward, of which any free one takes the next call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from ray.exceptions import RayTaskError

from cluster.actors.actor_spec import LOST, ActorSpec, reason
from cluster.actors.failure_budget import FailureBudget
from cluster.actors.outage import Outage
from cluster.actors.pool import Pool, Slot, call
from cluster.config.errors import PoolError
from cluster.record.events import warn
from rewards.scorer import Judgement, Unavailable, join, missing
from rewards.settings import RewardSettings
from rewards.spans import Span, arguments, calls

AWAY: Final = 1.0
"""Seconds between two calls of a reward whose server is unavailable."""


class RewardPool:
    """The replicas of one reward. A call is sent when a replica is free; until then its images stay handles.

    Calls are parts of what was sampled together, whatever the timing and the number of replicas, so that a
    model whose last bits depend on the batch returns the same bits again.
    """

    def __init__(
        self, reward: RewardSettings, *, groupwise: bool, node: str | None = None, watches: bool = False
    ) -> None:
        """Start the replicas; ``groupwise`` ones get each group whole, in a call of its own.

        ``node`` is the label of their Ray nodes. A reward that only ``watches`` neither delays nor ends a
        run: it is paused when it is unavailable or broken (see `Outage`).
        """
        spec = ActorSpec(
            name=reward.name, target="rewards.worker:RewardWorker",
            arguments={"name": reward.target, "options": reward.options},
            gpus=reward.gpus, threads=reward.threads, runtime_env=reward.runtime_env, node=node,
        )  # fmt: skip
        self.name, self.batch = reward.name, reward.batch
        self.groupwise = groupwise
        self.pool = Pool(spec, reward.workers, reward.deadline, reward.attempts)
        self.failure = self._remark = ""
        self._turns = asyncio.Semaphore(reward.workers)
        self._budget = FailureBudget(reward.deadline, 1 if watches else reward.attempts)
        self.outage = Outage(reward.name) if watches else None

    async def score(self, spans: Sequence[Span]) -> Judgement:
        """Score spans, in their order; scores that no attempt could compute are missing.

        Raises:
            PoolError: if the reward is broken and does not only watch.
        """
        parts = calls(spans, self.batch, groupwise=self.groupwise)
        return join(await asyncio.gather(*(self._send(part) for part in parts)))

    async def _send(self, spans: Sequence[Span]) -> Judgement:
        async with self._turns:
            return await self._scored(spans)

    async def _scored(self, spans: Sequence[Span]) -> Judgement:
        nothing = missing(sum(len(span.prompts) for span in spans))
        if self.outage and self.outage.paused:
            return nothing
        try:
            judgement: Judgement = await self._attempted(spans)
        except PoolError as error:
            self.failure = str(error)
            lasting = isinstance(error, Broken) or not isinstance(error.__cause__, RayTaskError)
            if self.outage and lasting:
                self.outage.begin(self.failure)
            elif isinstance(error, Broken):
                raise
            return nothing
        if self.outage:
            self.outage.end()
        self._log_remark(judgement)
        return judgement

    async def _attempted(self, spans: Sequence[Span]) -> Any:
        """Score spans with the pool's retries, or in a single attempt during an outage."""
        if not (self.outage and self.outage.ongoing):
            return await self.pool.run(lambda slot: self._call(slot, spans))
        try:
            return await self.pool.once(lambda slot: self._call(slot, spans))
        except (*LOST, RayTaskError) as error:
            raise Broken(self._describe_failure(error)) from error

    def _log_remark(self, judgement: Judgement) -> None:
        """Log the first remark about the scores."""
        if judgement.remark and not self._remark:
            self._remark = judgement.remark
            warn("score out of range", reward=self.name, reason=judgement.remark)

    async def _call(self, slot: Slot, spans: Sequence[Span]) -> Any:
        prompts = [prompt for span in spans for prompt in span.prompts]
        seen: int | None = None
        while True:
            deadline = self._budget.begin()
            try:
                found = await call(slot, "score_ranges", *arguments(spans), deadline=deadline)
                break
            except (*LOST, RayTaskError) as error:
                away = isinstance(error, RayTaskError) and isinstance(error.cause, Unavailable)
                # A server that has answered other calls meanwhile is available.
                away = away and seen in (None, self._budget.successes)
                if self._budget.failed(prompts, away=away) or (away and self.outage):
                    if self.outage and isinstance(error, LOST):
                        slot.replace()  # it may still hang, and will be called again
                    raise Broken(self._describe_failure(error)) from error
                if not away:
                    raise
            seen = self._budget.successes
            await asyncio.sleep(AWAY)
        self._budget.succeeded()
        return found[0]

    def _describe_failure(self, error: Exception) -> str:
        count, seconds = self._budget.failures, self._budget.seconds
        calls = f"{count} call{'s' * (count > 1)} in {seconds:.0f} s"
        return f"reward {self.name!r}: {calls} and none succeeded: {reason(error)}"


class Broken(PoolError):
    """A reward has stopped working; the message contains its own error."""
