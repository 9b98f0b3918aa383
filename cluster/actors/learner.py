"""The learner's ranks, which are called and restarted together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import ray
from ray.exceptions import ObjectLostError, RayTaskError
from ray.util.placement_group import PlacementGroup

from cluster.actors.actor_spec import DIED, LOST, ActorSpec, reason, spawn, unbuildable
from cluster.actors.pool import START_DEADLINE
from cluster.config.errors import LearnerError, LearnerLost
from cluster.config.settings import RunSettings
from learner import wire
from learner.objectives.registry import load_objective
from learner.rank_shares import rank_updates
from learner.records import Update, Written
from rollout.records import CandidateGroup, Weights, WeightsId
from selection.records import Selection

NOTICED: Final = 45.0
"""Seconds within which Ray notices a dead node, also with its default health checks (30 s were measured)."""


async def gather_ranks(what: str, refs: Sequence[Any], deadline: float) -> list[Any]:
    """Wait for the results of all ranks.

    Raises:
        LearnerLost: if one died, missed the deadline or needed data of a lost node.
        LearnerError: if one raised an error of its own.
    """
    waits = [asyncio.wrap_future(ref.future()) for ref in refs]
    every = asyncio.gather(*waits)
    every.add_done_callback(lambda done: done.cancelled() or done.exception())  # marks it as retrieved
    try:
        return await asyncio.wait_for(asyncio.shield(every), deadline)
    except TimeoutError:
        raise LearnerLost(f"learner {what}: no answer in {deadline:g} s") from None
    except DIED as error:
        kind = LearnerError if unbuildable(error) else LearnerLost
        raise kind(f"learner {what}: {reason(error)}") from error
    except RayTaskError as error:
        # When a rank dies, another one may report a closed connection first.
        await asyncio.wait(waits, timeout=NOTICED)
        failures = [wait.exception() for wait in waits if wait.done()]
        lost = [failure for failure in failures if isinstance(failure, Exception) and not _own(failure)]
        kind = LearnerLost if lost else LearnerError
        raise kind(f"learner {what}: {reason(lost[0] if lost else error)}") from error


def _own(error: Exception) -> bool:
    """Return whether a rank failed by its own error."""
    return not isinstance(error, DIED) and not isinstance(getattr(error, "cause", None), ObjectLostError)


def learner_spec(settings: RunSettings, group: PlacementGroup | None = None) -> ActorSpec:
    """Describe the learner ranks of a run, in the bundles of a placement group if one is given."""
    learner = settings.learner
    return ActorSpec(
        name="learner",
        target="learner.worker:LearnerWorker",
        arguments={
            "model": settings.model,
            "rollout": settings.rollout,
            "learner": learner,
            "seed": settings.seed,
            "horizon": settings.optimizer_steps,
        },
        gpus=learner.gpus,
        threads=learner.threads,
        node=settings.cluster.nodes.get("learner"),
        group=group,
    )


class Learner:
    """The learner ranks, called together: every collective method runs on all of them."""

    def __init__(self, settings: RunSettings, spec: ActorSpec | None = None) -> None:
        """Start the ranks of `learner_spec`, or those of another spec with the same interface."""
        self.settings, self.seed = settings.learner, settings.seed
        self.spec = spec or learner_spec(settings)
        self.objective = load_objective(settings.learner.objective)
        self.deadline = settings.cluster.learner_deadline
        self.parts = self.restarts = 0
        self.actors = [spawn(self.spec, rank) for rank in range(self.settings.ranks)]

    async def begin(self) -> None:
        """Form the first process group; if a rank is lost meanwhile, restart all once."""
        try:
            await self.join()
        except LearnerLost:
            await self.restart()

    async def restart(self) -> None:
        """Kill every rank, whatever its state, and start all of them again, as at step 0."""
        self.restarts += len(self.actors)
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        self.actors = [spawn(self.spec, rank) for rank in range(len(self.actors))]
        await self.join()

    async def join(self) -> None:
        """Form the process group at the first rank's address."""
        try:
            answer: Any = self.actors[0].address.remote().future()
            address, port = await asyncio.wait_for(asyncio.wrap_future(answer), START_DEADLINE)
        except LOST as error:
            kind = LearnerError if unbuildable(error) else LearnerLost
            raise kind(f"learner could not start: {reason(error)}") from error
        if len(self.actors) == 1:
            address = "127.0.0.1"
        world = len(self.actors)
        await self._every("join", [(rank, world, address, port) for rank in range(world)])
        self.parts = (await self._every("parts", [()] * world))[0]

    async def update(self, step: int, selection: Selection, groups: Sequence[CandidateGroup]) -> Update:
        """Train on a step's kept candidates, and merge the suspects and broken parameters of all ranks."""
        work = rank_updates(
            selection.kept, groups,
            ranks=self.settings.shares, updates=self.settings.updates, seed=self.seed, step=step,
            units=self.objective.units(selection.kept),
        )  # fmt: skip
        calls = [wire.spread(part) for part in work for _ in range(self.settings.sequence_parallel)]
        results: list[Update] = await self._every("update", calls, gather=wire.gather)
        suspects = sorted({number for update in results for number in update.suspects})
        broken = dict.fromkeys(name for update in results for name in update.broken)
        return Update(metrics=results[0].metrics, suspects=tuple(suspects), broken=tuple(broken))

    async def updates(self) -> int:
        """Count the optimizer steps ever applied, also before a checkpoint that was restored."""
        count: int = (await self._every("ping", [()] * len(self.actors)))[0]
        return count

    async def publish(self, weights: WeightsId) -> Weights:
        """Publish the weights of all ranks as objects of the store."""
        parts: list[list[Any]] = [
            [
                actor.call.options(num_returns=2).remote("part", number, weights.averaged)
                for actor in self.actors
            ]
            for number in range(self.parts)
        ]
        return Weights(
            id=weights,
            checksums=tuple(digest for (digest, _), *_ in parts),
            parts=tuple(flat for (_, flat), *_ in parts),
        )

    async def save(self, url: str) -> None:
        """Write every rank's share of a checkpoint, or start to upload it."""
        await self._every("save", [(url,)] * len(self.actors))

    async def saved(self, *, wait: bool) -> list[Written] | None:
        """Return what every rank has written, once all has arrived; until then None, unless ``wait``."""
        answers: list[Written | None] = await self._every("saved", [(wait,)] * len(self.actors))
        written = [answer for answer in answers if answer is not None]
        return written if len(written) == len(answers) else None

    async def restore(self, url: str) -> None:
        """Restore every rank's share of a checkpoint."""
        await self._every("restore", [(url,)] * len(self.actors))

    async def _every(self, method: str, calls: Sequence[tuple[Any, ...]], **flat: Any) -> list[Any]:
        refs: list[Any] = [
            actor.call.remote(method, *arguments, **flat)
            for actor, arguments in zip(self.actors, calls, strict=True)
        ]
        return await gather_ranks(method, refs, self.deadline)
