"""A run in progress: its stages, its state, and the observers of its steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.config.settings import RunSettings
from cluster.loop.production import GroupIds, Produced
from cluster.loop.stages import Stages
from cluster.record.events import STEP
from learner.records import Update
from rollout.records import CandidateGroup, Prompt
from selection.records import Selection


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of a step: the groups, the selection, and the update, if any candidate was kept."""

    batch: Sequence[Produced]
    selection: Selection
    update: Update | None

    @property
    def groups(self) -> list[CandidateGroup]:
        """The groups without their scores."""
        return [produced.group for produced in self.batch]


class Observer(Protocol):
    """A concern outside the algorithm: a check, a record, an evaluation, a checkpoint.

    Observers are called in order after every step, counted from one, when the samplers have the new weights.
    ``metrics`` are the line to be logged, to which each may add. Before the first step they are called with
    step 0 and ``made`` None.
    """

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Observe a step."""
        ...


class Stopwatch:
    """The times at which the parts of a step ended, in `time.perf_counter`."""

    def __init__(self) -> None:
        """Set all times to now."""
        self.began = self.ready = self.selected = self.updated = self.loaded = time.perf_counter()

    def begin(self, step: int) -> None:
        """Start a step, which events are logged with from now on."""
        STEP.set(step)
        self.began = time.perf_counter()

    def seconds(self, batch: Sequence[Produced]) -> dict[str, float]:
        """Return the seconds of every stage, as metrics.

        Of sampling and scoring only the time that the step waited counts; the rest overlaps earlier updates.
        """
        sampled = max(produced.sampled for produced in batch)
        scored = max(produced.scored for produced in batch)
        return {
            "seconds_sample": max(0.0, sampled - self.began),
            "seconds_score": max(0.0, scored - max(sampled, self.began)),
            "seconds_select": self.selected - self.ready,
            "seconds_learn": self.updated - self.selected,
            "seconds_broadcast": self.loaded - self.updated,
            "seconds_step": time.perf_counter() - self.began,
        }


@dataclass(slots=True)
class Run:
    """The context of the loop; setting ``stop`` ends it after the current step."""

    settings: RunSettings
    prompts: tuple[Prompt, ...]
    stages: Stages
    groups: GroupIds
    observers: Sequence[Observer]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    empty_batches: int = 0
    """Steps in a row that kept nothing."""
    updates: int = 0
    """Optimizer steps ever applied, also before the run was resumed."""
    watch: Stopwatch = field(default_factory=Stopwatch)

    async def begin(self, start: int) -> None:
        """Load the learner's weights into the samplers; before the first step, call the observers."""
        self.updates = await self.stages.updates()
        await self.stages.load(start)
        if start == 0:
            await self._observe(0, None)

    async def select(self, step: int, batch: Sequence[Produced]) -> Selection:
        """Keep the candidates that are trained on."""
        self.watch.ready = time.perf_counter()
        ids, scores = [produced.group.group_id for produced in batch], [produced.scores for produced in batch]
        selection = await self.stages.select(step, ids, scores)
        self.watch.selected = time.perf_counter()
        return selection

    async def update(self, step: int, selection: Selection, batch: Sequence[Produced]) -> Update | None:
        """Train on the kept candidates, if there are any."""
        update = None
        if selection.kept:
            update = await self.stages.update(step, selection, [produced.group for produced in batch])
            self.updates = int(update.metrics["updates"])
        self.empty_batches = 0 if selection.kept else self.empty_batches + 1
        self.watch.updated = time.perf_counter()
        return update

    async def load(self, version: int) -> None:
        """Load the learner's weights into the samplers."""
        await self.stages.load(version)
        self.watch.loaded = time.perf_counter()

    async def conclude(
        self, step: int, batch: Sequence[Produced], selection: Selection, update: Update | None
    ) -> None:
        """Call the observers of a step, counted from one."""
        await self._observe(step, Step(batch, selection, update))

    def ends(self, step: int) -> bool:
        """Return whether this is the last step of the run or before a stop."""
        return step == self.settings.steps or self.stop.is_set()

    async def _observe(self, step: int, made: Step | None) -> None:
        metrics: dict[str, Any] = {"step": step}
        for observer in self.observers:
            await observer.after(self, step, made, metrics)
