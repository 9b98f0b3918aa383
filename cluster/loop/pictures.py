"""Save the widest pairs of some steps as images."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from cluster.loop.run import Run, Step
from cluster.record.run_folder import RunFolder

PAIRS_SHOWN: Final = 4


@dataclass(frozen=True, slots=True)
class Pictures:
    """An observer that saves the pairs of the first step, the last step and every ``image_every`` steps."""

    folder: RunFolder

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Save the worst and the best candidate of the groups with the widest margins."""
        settings = run.settings
        if made is None or (step not in (1, settings.steps) and step % settings.image_every):
            return
        by_id = {group.group_id: group for group in made.groups}
        for group in sorted(made.selection.groups, key=lambda g: -g.margin)[:PAIRS_SHOWN]:
            kept = [k.candidate for k in made.selection.kept if k.group_id == group.group_id]
            if len(kept) >= 2:
                handles = by_id[group.group_id].images
                images = np.concatenate([await run.stages.fetch(handle) for handle in handles])
                pair = (kept[0], kept[-1])
                await asyncio.to_thread(self.folder.save_pair, step, group.group_id, images, pair)
