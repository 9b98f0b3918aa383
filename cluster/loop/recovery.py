"""Recover from the loss of the learner within a run, from the last checkpoint."""

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
"""Recoveries from one checkpoint at most, since more losses are not a coincidence."""
PAUSE: Final = 5.0
"""Seconds before the second recovery, twice that before the third: Ray may not yet know of a dead node."""
LOSSES: Final = (LearnerLost, DataLost)
"""Ranks that died or hang, and data of the step that were lost with their node."""


async def train_through_losses(course: Course, start: int, print_line: Callable[[str], None]) -> int:
    """Train as `train` does, and continue from the last checkpoint after each loss, which is printed.

    All but the learner's state is a pure function of the seed and the step, so weights, metrics and ledger
    end as without a loss.

    Raises:
        GaveUp: after repeated losses without a new checkpoint in between.
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
            loss = _describe_loss(error)
            if loss is None:
                raise
        commit = await asyncio.to_thread(course.checkpoints.newest)
        course.checkpoints.report_damage(print_line)
        step = commit.step if commit else 0
        losses[step] += 1
        if losses[step] > ATTEMPTS:
            raise GaveUp(f"{loss}; this is loss number {losses[step]} after step {step}")
        warn("learner lost", reason=loss, back_to=step)
        print_line(f"{loss}: all ranks restart from step {step}")
        await asyncio.sleep(PAUSE * (losses[step] - 1))


def _describe_loss(error: Exception) -> str | None:
    """Describe a loss; None if there was another error as well."""
    if isinstance(error, ExceptionGroup):
        lost, rest = error.split(LOSSES)
        return None if lost is None or rest is not None else _describe_loss(lost.exceptions[0])
    return str(error)
