"""Checkpoints: the commit marker is written last, and its presence is the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from cluster.stages import Learner

MARKER: Final = "COMMITTED"


class Checkpoints:
    """The checkpoints of a run, newest kept.

    Everything outside the learner is a pure function of the seed and the step (prompts, noise, ties and
    shuffles), so the learner's state and the step's number are all there is to save.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Manage the checkpoints below a folder; ``keep`` of them survive."""
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        """Where the checkpoint after a step lies."""
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """The steps with a committed checkpoint, oldest first."""
        return sorted(int(p.parent.name.removeprefix("step-")) for p in self.folder.glob(f"step-*/{MARKER}"))

    async def commit(self, step: int, learner: Learner) -> None:
        """Save the learner, mark the checkpoint as committed and drop the oldest ones."""
        path = self.path(step)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        await learner.save(str(path.absolute()))
        (path / MARKER).touch()
        for old in self.steps()[: -self.keep]:
            (self.path(old) / MARKER).unlink()  # first, so that half a checkpoint never looks like one
            shutil.rmtree(self.path(old))

    async def restore(self, step: int, learner: Learner) -> None:
        """Load the checkpoint after a step into the learner."""
        await learner.restore(str(self.path(step).absolute()))
