"""Training through the loss of the learner: all ranks anew, from the last checkpoint, within the same run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

from ray.exceptions import ObjectLostError

from cluster.actors.learner import LearnerLost
from cluster.actors.pool import reason
from cluster.loop.drift_guard import guard_of
from cluster.loop.loop import Run, train
from cluster.record.events import warn
from cluster.record.marker import Commit

ATTEMPTS: Final = 3
"""How often a run goes back to one checkpoint: what goes wrong more often is no accident."""
PAUSE: Final = 5.0
"""Seconds before it goes back once more, and twice as many then: Ray may not know yet that a node is dead."""
LOSSES: Final = (LearnerLost, ObjectLostError)
"""Ranks that died or hang, and data of the step that were on a node that is gone."""


class GaveUp(RuntimeError):
    """The learner was lost again and again after the same checkpoint."""


async def train_through_losses(run: Run, start: int, tell: Callable[[str], None]) -> int:
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
                await _go_back(run, commit)
            return await train(run, start)
        except (*LOSSES, ExceptionGroup) as error:
            story = _story(error)
            if story is None:
                raise
        commit = await asyncio.to_thread(run.checkpoints.newest)
        run.checkpoints.tell_damage(tell)
        start = commit.step if commit else 0
        losses[start] += 1
        if losses[start] > ATTEMPTS:
            raise GaveUp(f"{story}; it is the loss number {losses[start]} after step {start}")
        warn("learner lost", reason=story, back_to=start)
        tell(f"{story}: all ranks start anew, from step {start}")
        await asyncio.sleep(PAUSE * (losses[start] - 1))


def _story(error: Exception) -> str | None:
    """What was lost; none if something else went wrong, too."""
    if isinstance(error, ExceptionGroup):
        lost, rest = error.split(LOSSES)
        return None if lost is None or rest is not None else _story(lost.exceptions[0])
    return str(error) if isinstance(error, LearnerLost) else reason(error)


async def _go_back(run: Run, commit: Commit | None) -> None:
    """To the state of a checkpoint; the run folder forgets what came after, and samplers what they hold."""
    checkpoints, stages = run.checkpoints, run.stages
    checkpoints.pending = None
    if commit:
        checkpoints.rewind(commit, run.folder)
    else:
        run.folder.rewind(-1)
    run.empty_batches = commit.empty_batches if commit else 0
    run.guard = guard_of(run.settings, run.folder.history())
    stages.rollouts.forget()
    await stages.learner.restart()
    if commit:
        await checkpoints.restore(commit.step, stages.learner)
