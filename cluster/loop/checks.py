"""What ends a run early: steps whose images, weights or margins leave nothing to go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.record.nonfinite import Named
from cluster.record.nothing_learned import nothing_learned, some

if TYPE_CHECKING:
    from cluster.loop.loop import Run
    from learner.records import Update
    from rollout.records import CandidateGroup


class RunStopped(RuntimeError):
    """The run cannot go on usefully; the message says why."""


def check_images(run: Run, groups: Sequence[CandidateGroup], broken: Sequence[Named]) -> None:
    """Stop if no candidate of a step is finite; those that were left out for their previews do not count.

    Raises:
        RunStopped: naming the file that holds their seeds.
    """
    count = sum(len(group.noises) for group in groups)
    if sum("candidate" in one for one in broken) == count:
        raise RunStopped(
            f"none of the step's {count} images is finite, so there is nothing to judge; "
            f"their seeds are in {run.folder.nonfinite}"
        )


def check_margins(run: Run, metrics: Mapping[str, Any]) -> None:
    """Stop after too many steps without a margin; ``metrics`` are those of the last one.

    Raises:
        RunStopped: saying of all these steps what there was instead, and what to raise.
    """
    count = run.empty_batches
    if count >= run.settings.max_empty_batches:
        rows = [*run.folder.history(), metrics][-count:]
        why = nothing_learned(rows, run.settings.groups_per_step)
        raise RunStopped(f"{count} steps in a row had no group with a reward margin: {why}")


def check_weights(run: Run, update: Update) -> None:
    """Stop if weights are not finite: they draw nothing any more, and no later update mends them.

    Raises:
        RunStopped: naming the first of them and the learning rate.
    """
    if update.broken:
        rate = update.metrics["learning_rate"]
        raise RunStopped(
            f"after {run.updates} optimizer steps, the last with a learning rate of {rate:g}, the weights "
            f"are no longer finite: {some(update.broken)}; try a lower learner.learning_rate or a warm-up"
        )
