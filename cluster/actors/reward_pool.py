"""The shards of one reward: images in, a judgement out, in calls of a bounded size to whoever is free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from ray.exceptions import RayTaskError

from cluster.actors.actor_spec import Role
from cluster.actors.outage import Outage
from cluster.actors.pool import LOST, Pool, Slot, call, reason
from cluster.config.errors import PoolError
from cluster.record.events import warn
from rewards.scorer import Judgement, Unavailable, join, missing
from rewards.settings import RewardSettings
from rewards.spans import Span, arguments, calls
from rollout.records import Prompt

ENOUGH: Final = 1.4
"""Deadlines without a success after which nothing more is tried, so that all is over within two."""
LAST: Final = 1.9
"""Deadlines after which the last try ends; what is left of two is for stopping the run."""
AWAY: Final = 1.0
"""Seconds between two calls of a reward whose server is away."""
STREAK: Final = 8
"""Failures in a row that are no coincidence, however quickly they came."""


class Drought:
    """How long a reward has worked without a success, and whether it is broken rather than unlucky.

    One that never succeeded is broken after two deadlines; one that did gets ``attempts`` times as long, and
    is not broken as long as all failures have a prompt in common, since the fault may be the prompt's. Time
    in which a shard starts does not let the next call have less than half a deadline.
    """

    def __init__(self, deadline: float, attempts: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self.deadline, self.attempts, self.clock = deadline, attempts, clock
        self.failures = self.successes = 0
        self._since = 0.0
        self._waiting = False
        self._suspects: set[int] | None = None

    @property
    def patience(self) -> int:
        """How many times two deadlines it may last."""
        return self.attempts if self.successes else 1

    @property
    def seconds(self) -> float:
        """Seconds since the first call without a success started."""
        return self.clock() - self._since

    def begin(self) -> float:
        """Count a call that starts now; returns the seconds it may take."""
        if not self._waiting:
            self._since, self._waiting = self.clock(), True
        if not self.failures:
            return self.deadline
        left = LAST * self.patience * self.deadline - self.seconds
        return min(self.deadline, max(self.deadline / 2, left))

    def succeeded(self) -> None:
        """A call came back: start from nothing."""
        self.failures, self._waiting, self._suspects = 0, False, None
        self.successes += 1

    def failed(self, prompts: Iterable[Prompt] = (), *, away: bool = False) -> bool:
        """Count a call of some prompts that failed; returns whether the reward is broken.

        What is only ``away`` fails quickly and often, and that says nothing.
        """
        if self.successes and not away and self._share(prompts):
            self.failures, self._since = 0, self.clock()
            return False
        self.failures += 1
        long = self.failures > 1 and self.seconds >= ENOUGH * self.patience * self.deadline
        return long or (not away and self.failures >= STREAK * self.patience)

    def _share(self, prompts: Iterable[Prompt]) -> bool:
        """Whether all failures since the last success, these included, have a prompt in common."""
        asked = {prompt.index for prompt in prompts}
        self._suspects = asked if self._suspects is None else self._suspects & asked
        return bool(self._suspects)


class Shards:
    """The pool of one reward. A call goes to a shard when it is free, so what waits, waits as a handle.

    Calls are cut from what was sampled together, which does not depend on time or on the number of shards,
    so a model whose last bits depend on the batch gives the same bits again.
    """

    def __init__(
        self, reward: RewardSettings, *, groupwise: bool, node: str | None = None, watches: bool = False
    ) -> None:
        """Start the shards; ``groupwise`` ones get each group whole, in a call of its own.

        ``node`` is the role of the Ray nodes that they have to be on. A reward that only ``watches`` is never
        waited for and ends nothing: when it is away or broken it rests (see `Outage`).
        """
        role = Role(
            name=reward.name, target="rewards.worker:RewardWorker",
            arguments={"name": reward.target, "options": reward.options},
            gpus=reward.gpus, threads=reward.threads, runtime_env=reward.runtime_env, node=node,
        )  # fmt: skip
        self.name, self.batch = reward.name, reward.batch
        self.groupwise = groupwise
        self.pool = Pool(role, reward.workers, reward.deadline, reward.attempts)
        self.failure = self._remark = ""
        self._turns = asyncio.Semaphore(reward.workers)
        self._drought = Drought(reward.deadline, 1 if watches else reward.attempts)
        self.outage = Outage(reward.name) if watches else None

    async def score(self, spans: Sequence[Span]) -> Judgement:
        """Score spans, in their order; what no attempt could score is missing.

        Raises:
            PoolError: if the reward is broken and does not only watch.
        """
        parts = calls(spans, self.batch, groupwise=self.groupwise)
        return join(await asyncio.gather(*(self._send(part) for part in parts)))

    async def _send(self, spans: Sequence[Span]) -> Judgement:
        async with self._turns:
            return await self._judgement(spans)

    async def _judgement(self, spans: Sequence[Span]) -> Judgement:
        nothing = missing(sum(len(span.prompts) for span in spans))
        if self.outage and self.outage.rests:
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
        self._look_at(judgement)
        return judgement

    async def _attempted(self, spans: Sequence[Span]) -> Any:
        """What some attempt of the pool's says; only one is made of a reward whose outage lasts."""
        if not (self.outage and self.outage.lasts):
            return await self.pool.run(lambda slot: self._call(slot, spans))
        try:
            return await self.pool.once(lambda slot: self._call(slot, spans))
        except (*LOST, RayTaskError) as error:
            raise Broken(self._story(error)) from error

    def _look_at(self, judgement: Judgement) -> None:
        """Note once what is odd about the scores."""
        if judgement.remark and not self._remark:
            self._remark = judgement.remark
            warn("score out of range", reward=self.name, reason=judgement.remark)

    async def _call(self, slot: Slot, spans: Sequence[Span]) -> Any:
        prompts = [prompt for span in spans for prompt in span.prompts]
        answered: int | None = None
        while True:
            deadline = self._drought.begin()
            try:
                found = await call(slot, "score_ranges", *arguments(spans), deadline=deadline)
                break
            except (*LOST, RayTaskError) as error:
                away = isinstance(error, RayTaskError) and isinstance(error.cause, Unavailable)
                # Who answers others is not away.
                away = away and answered in (None, self._drought.successes)
                if self._drought.failed(prompts, away=away) or (away and self.outage):
                    if self.outage and isinstance(error, LOST):
                        slot.replace()  # it may hang still, and will be asked again
                    raise Broken(self._story(error)) from error
                if not away:
                    raise
            answered = self._drought.successes
            await asyncio.sleep(AWAY)
        self._drought.succeeded()
        return found[0]

    def _story(self, error: Exception) -> str:
        count, seconds = self._drought.failures, self._drought.seconds
        calls = f"{count} call{'s' * (count > 1)} in {seconds:.0f} s"
        return f"reward {self.name!r}: {calls} and none succeeded: {reason(error)}"


class Broken(PoolError):
    """A reward that has stopped working; the message holds its own error."""
