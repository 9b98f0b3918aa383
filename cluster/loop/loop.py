"""The training loop: oversample the noise, score, keep the widest margins, update, broadcast the weights."""

from __future__ import annotations

from cluster.loop.production import Production
from cluster.loop.run import Run


async def train(run: Run, start: int) -> int:
    """Train from a step to the last one, or to a stop, and return the number of steps done."""
    await run.begin(start)
    async with Production(run.settings, run.prompts, run.stages, run.groups, first=start) as groups:
        for step in range(start, run.settings.steps):
            run.watch.begin(step + 1)
            batch = await groups.next(version=step)
            selection = await run.select(step, batch)
            update = await run.update(step, selection, batch)
            await run.load(step + 1)
            await run.conclude(step + 1, batch, selection, update)
            if run.stop.is_set():  # only here, so that a stop always finds its checkpoint
                return step + 1
    return run.settings.steps
