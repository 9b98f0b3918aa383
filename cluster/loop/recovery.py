"""Train through the loss of the learner: all ranks anew, from the last checkpoint, within the same run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

from cluster.config.errors import DataLost, GaveUp, LearnerLost
from cluster.loop.course import Course
from cluster.loop.loop import train
from cluster.record.events import warn
from cluster.record.marker import Commit

ATTEMPTS: Final = 3
"""How often a run goes back to one checkpoint: what goes wrong more often is no accident."""
PAUSE: Final = 5.0
"""Seconds before it goes back once more, and twice as many then: Ray may not know yet that a node is dead."""
LOSSES: Final = (LearnerLost, DataLost)
"""Ranks that died or hang, and data of the step that were on a node that is gone."""


async def train_through_losses(course: Course, start: int, tell: Callable[[str], None]) -> int:
    """Train as `train` does; a loss takes the run back to its last checkpoint, and it goes on from there.

    All but the learner's state is a pure function of the seed and the step, so weights, metrics and ledger
    end as if nothing had happened. ``tell`` gets a line per loss.

    Raises:
        GaveUp: if it happens again and again without a new checkpoint in between.
        UserError: if every checkpoint is damaged.
    """
    losses: Counter[int] = Counter()
    commit: Commit | None = None
    while True:
        try:
            if losses:
                await course.stages.restart()
                start = await course.go_to(commit)
            return await train(course.run, start)
        except (*LOSSES, ExceptionGroup) as error:
            story = _story(error)
            if story is None:
                raise
        commit = await asyncio.to_thread(course.checkpoints.newest)
        course.checkpoints.tell_damage(tell)
        step = commit.step if commit else 0
        losses[step] += 1
        if losses[step] > ATTEMPTS:
            raise GaveUp(f"{story}; it is the loss number {losses[step]} after step {step}")
        warn("learner lost", reason=story, back_to=step)
        tell(f"{story}: all ranks start anew, from step {step}")
        await asyncio.sleep(PAUSE * (losses[step] - 1))


def _story(error: Exception) -> str | None:
    """Describe what was lost; None if something else went wrong, too."""
    if isinstance(error, ExceptionGroup):
        lost, rest = error.split(LOSSES)
        return None if lost is None or rest is not None else _story(lost.exceptions[0])
    return str(error)
