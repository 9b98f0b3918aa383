"""Pools of actors, with their deadlines, retries and replacement."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from ray.exceptions import ObjectLostError, RayTaskError

from cluster.actors.actor_spec import DIED, LOST, ActorSpec, reason, spawn, unbuildable
from cluster.config.errors import DataLost, PoolError
from cluster.record.events import warn
from rollout.records import WeightsId

ATTEMPTS: Final = 3
START_DEADLINE: Final = 600.0
PAUSES: Final = (0.5, 60.0)
"""Seconds before an actor that could not start is started again: the first time, and at most."""


class Slot:
    """One place of a pool and its current actor, which does one thing at a time."""

    def __init__(self, spec: ActorSpec, number: int) -> None:
        """Start the first actor."""
        self.spec, self.number = spec, number
        self.holds: WeightsId | None = None
        self.started = self.busy = False
        self.starting: asyncio.Future[None] | None = None
        self.actor = spawn(spec, number)

    async def start(self) -> None:
        """Wait until the actor has built its worker, which may take longer than a call may."""
        if not self.started:
            await call(self, "ping", deadline=START_DEADLINE)
            self.started = True

    @property
    def name(self) -> str:
        """The name of its actors."""
        return f"{self.spec.name}-{self.number}"

    def replace(self) -> None:
        """Kill the actor, hung or dead, and start another one, which has no weights yet."""
        ray.kill(self.actor, no_restart=True)
        self.holds = None
        self.started = False
        self.actor = spawn(self.spec, self.number)


async def call(
    slot: Slot,
    method: str,
    *arguments: Any,
    deadline: float,
    returns: int = 1,
    spread: Callable[[Any], Sequence[Any]] | None = None,
) -> list[Any]:
    """Call a worker's method and wait for its first result; the others stay in the object store.

    Where the method returns one record, ``spread`` flattens it to ``returns`` values.

    Returns:
        The first result's value, then the references of the others.

    Raises:
        TimeoutError: if the deadline passes.
        DataLost: if an argument was lost with its node, so that a retry would fail as well.
    """
    refs: Any = slot.actor.call.options(num_returns=returns).remote(method, *arguments, spread=spread)
    refs = refs if returns > 1 else [refs]
    try:
        value = await asyncio.wait_for(asyncio.wrap_future(refs[0].future()), deadline)
    except TimeoutError:
        raise TimeoutError(f"{method} gave no answer in {deadline:g} s") from None
    except (ObjectLostError, RayTaskError) as error:
        lost = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(lost, ObjectLostError):
            raise DataLost(reason(lost)) from None
        raise
    return [value, *refs[1:]]


@dataclass(slots=True, eq=False)
class Turn:
    """Queued work that waits for any actor, or for the actor of one slot."""

    on: Slot | None
    slot: asyncio.Future[Slot] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Pool:
    """Equal actors behind one queue; a lost or hung one is replaced, and its work is retried on another.

    Any free actor takes the next work, so an actor that cannot start, because its node is lost, delays
    nothing while another one works, and takes work as soon as it has started.
    """

    def __init__(self, spec: ActorSpec, count: int, deadline: float, attempts: int = ATTEMPTS) -> None:
        """Start ``count`` actors; a call has ``deadline`` seconds from when it has its actor."""
        self.spec, self.deadline, self.attempts = spec, deadline, attempts
        self.slots = [Slot(spec, number) for number in range(count)]
        self.restarts = 0
        self._queue: list[Turn] = []

    @property
    def up(self) -> list[Slot]:
        """The slots whose actors have started."""
        return [slot for slot in self.slots if slot.started]

    @property
    def waiting(self) -> int:
        """The amount of work that is queued or in progress."""
        return len(self._queue) + sum(slot.busy for slot in self.slots)

    async def ready(self, least: int | None = None) -> None:
        """Wait until ``least`` actors (by default all) have started; the others join the pool later.

        Raises:
            PoolError: if a worker cannot be built, with its own error.
        """
        wanted = len(self.slots) if least is None else least
        starts = [asyncio.ensure_future(self._build(slot)) for slot in self.slots]
        try:
            for count, start in enumerate(asyncio.as_completed(starts), 1):
                await start
                if count >= wanted:
                    break
        except LOST as error:
            raise PoolError(f"{self.spec.name} could not start: {reason(error)}") from error
        finally:
            for unfinished in starts:
                unfinished.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
        self._begin()

    async def _build(self, slot: Slot) -> None:
        """Start an actor, and retry if it dies for another reason than its worker's constructor."""
        for last in (*[False] * (self.attempts - 1), True):
            try:
                return await slot.start()
            except DIED as error:
                if last or unbuildable(error):
                    raise
                self.restarts += 1
                slot.replace()

    async def run(self, work: Callable[[Slot], Awaitable[Any]], *, on: Slot | None = None) -> Any:
        """Run some work on the next free actor (or in one slot), and retry if the actor or the call fails.

        Work starts in the order of the calls, but retries start first.

        Raises:
            PoolError: after the last attempt.
        """
        failed, spare = 0, len(self.slots) - 1
        while True:
            try:
                return await self.once(work, on=on, first=failed > 0)
            except (*LOST, RayTaskError) as error:
                failed += 1
                if isinstance(error, DIED) and spare:
                    spare -= 1  # it may have been dead before the call, like every actor of a lost node
                elif failed >= self.attempts + len(self.slots) - 1 - spare:
                    raise PoolError(f"{self.spec.name}: failed {failed} times: {reason(error)}") from error

    async def once(
        self, work: Callable[[Slot], Awaitable[Any]], *, on: Slot | None = None, first: bool = False
    ) -> Any:
        """Make a single attempt of `run`; a lost actor is replaced and its error raised."""
        async with self._turn(on, first) as slot:
            try:
                return await work(slot)
            except RayTaskError as error:
                warn("call failed", worker=slot.name, reason=reason(error))
                raise
            except LOST as error:
                warn("actor replaced", worker=slot.name, reason=reason(error))
                self.restarts += 1
                slot.replace()
                raise

    @asynccontextmanager
    async def _turn(self, on: Slot | None, first: bool) -> AsyncIterator[Slot]:
        """Wait for a slot and occupy it during the block."""
        turn = Turn(on)
        self._queue.insert(0 if first else len(self._queue), turn)
        self._begin()
        try:
            slot = await turn.slot
        except asyncio.CancelledError:
            if not turn.slot.cancelled() and turn.slot.exception() is None:
                turn.slot.result().busy = False  # assigned at the moment of the cancellation
            raise
        finally:
            self._begin()
        try:
            yield slot
        finally:
            slot.busy = False
            self._begin()

    def _begin(self) -> None:
        """Assign queued work to free actors, and start the actors that have not started."""
        self._queue = [turn for turn in self._queue if not turn.slot.done()]
        for slot in self.slots:
            if not slot.started and (slot.starting is None or slot.starting.done()):
                slot.starting = asyncio.ensure_future(self._start(slot))
            if not slot.started or slot.busy:
                continue
            if turn := next((turn for turn in self._queue if turn.on in (None, slot)), None):
                self._queue.remove(turn)
                slot.busy = True
                turn.slot.set_result(slot)

    async def _start(self, slot: Slot) -> None:
        """Start an actor in the background, retrying without end while others work."""
        pause, longest = PAUSES
        while not slot.started:
            try:
                await slot.start()
            except LOST as error:
                self._fail_waiting(slot, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
                slot.replace()
        asyncio.get_running_loop().call_soon(self._begin)

    def _fail_waiting(self, slot: Slot, error: Exception) -> None:
        """Fail queued work that no other actor can take, with this error."""
        for turn in self._queue:
            if (turn.on is slot or not self.up) and not turn.slot.done():
                turn.slot.set_exception(error)
