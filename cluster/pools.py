"""Pools of actors: deadlines, retries and replacement live here and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from cluster.placement import Role, spawn

ATTEMPTS: Final = 3
START_DEADLINE: Final = 600.0
STARTING: Final = 2
"""Calls that another actor may have waiting before work waits for one to start."""
LOST: Final = (ActorDiedError, ActorUnavailableError, TimeoutError)


class PoolError(RuntimeError):
    """A call failed on every attempt; the message holds the last cause."""


class Slot:
    """One place of a pool: its current actor, and a first-in-first-out lock that serialises its calls."""

    def __init__(self, role: Role, number: int) -> None:
        """Start the first actor."""
        self.role, self.number = role, number
        self.lock = asyncio.Lock()
        self.waiting = 0
        self.holds = ""
        self.started = False
        self.warming: asyncio.Future[None] | None = None
        self.actor = spawn(role, number)

    async def start(self) -> None:
        """Wait until the actor has built its worker, which may take longer than a call may."""
        if not self.started:
            await call(self, "ping", deadline=START_DEADLINE)
            self.started = True

    @property
    def load(self) -> int:
        """How long the queue is here: one that is still starting counts as a long one."""
        return self.waiting + (0 if self.started else STARTING)

    async def warm(self) -> None:
        """Start ahead of work; who comes to an actor that could not start learns why."""
        with suppress(*LOST):
            await self.start()

    def replace(self) -> None:
        """Kill the actor, hung or dead, and start another one that holds nothing yet."""
        ray.kill(self.actor, no_restart=True)
        self.holds = ""
        self.started = False
        self.actor = spawn(self.role, self.number)


async def call(slot: Slot, method: str, *arguments: Any, returns: int = 1, deadline: float) -> list[Any]:
    """Call a worker's method; wait for its first result, leave the others where they are.

    Returns:
        The first result's value, then the references of the others.

    Raises:
        TimeoutError: if the deadline passes.
    """
    refs: Any = slot.actor.call.options(num_returns=returns).remote(method, *arguments)
    refs = refs if returns > 1 else [refs]
    try:
        value = await asyncio.wait_for(asyncio.wrap_future(refs[0].future()), deadline)
    except TimeoutError:
        raise TimeoutError(f"{method} gave no answer in {deadline:g} s") from None
    return [value, *refs[1:]]


class Pool:
    """Equal actors that take turns; a lost or hung one is replaced and its work is done again elsewhere."""

    def __init__(self, role: Role, count: int, deadline: float, attempts: int = ATTEMPTS) -> None:
        """Start ``count`` actors; each call gets ``deadline`` seconds once it has its actor."""
        self.role, self.deadline, self.attempts = role, deadline, attempts
        self.slots = [Slot(role, number) for number in range(count)]
        self.restarts = 0

    async def ready(self) -> None:
        """Wait until every actor answers.

        Raises:
            PoolError: if a worker cannot be built, with its own error.
        """
        try:
            await asyncio.gather(*(slot.start() for slot in self.slots))
        except LOST as error:
            raise PoolError(f"{self.role.name} could not start: {reason(error)}") from error

    async def run(self, work: Callable[[Slot], Awaitable[Any]], *, on: Slot | None = None) -> Any:
        """Do some work on the least busy actor (or at one slot), again if it is lost or the call fails.

        Work at a slot runs in the order in which it was asked for.

        Raises:
            PoolError: after the last attempt.
        """
        cause: Exception | None = None
        for _ in range(self.attempts):
            slot = on or min(self.slots, key=lambda s: s.load)
            try:
                return await self._at(slot, work)
            except (*LOST, RayTaskError) as error:
                cause = error
        raise PoolError(f"{self.role.name}: failed {self.attempts} times: {reason(cause)}") from cause

    async def _at(self, slot: Slot, work: Callable[[Slot], Awaitable[Any]]) -> Any:
        slot.waiting += 1
        try:
            async with slot.lock:
                await slot.start()
                return await work(slot)
        except LOST:
            self.restarts += 1
            slot.replace()
            slot.warming = asyncio.ensure_future(slot.warm())
            raise
        finally:
            slot.waiting -= 1


def reason(error: Exception | None) -> str:
    """The cause of a failed call in one line, without Ray's tracebacks."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ActorDiedError) and "creation task" in lines[0]:
        return lines[-1]  # the worker's own exception, at the end of its traceback
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
