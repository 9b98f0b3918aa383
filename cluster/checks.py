"""What ends a run early: steps whose images leave nothing to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.broken import Named

if TYPE_CHECKING:
    from cluster.loop import Run
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
