"""The guard against reward hacking: how far images and held-out rewards are from where they started."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, Final

from cluster.actors.actor_spec import Role
from cluster.actors.pool import Pool, PoolError, Slot, call
from cluster.config.settings import GuardSettings, RunSettings
from rollout.records import Chunk

IMAGE: Final = "image_"
"""What the names of image statistics start with among the metrics."""


class Observer:
    """The actor that measures the images of every group, beside their rewards."""

    def __init__(self, settings: RunSettings) -> None:
        """Start the actor."""
        node = settings.cluster.nodes.get("observer")
        role = Role(name="observer", target="rewards.image_statistics:ImageObserver", node=node)
        self.pool = Pool(role, 1, settings.cluster.deadline)

    async def measure(self, chunks: Sequence[Awaitable[Chunk]]) -> Mapping[str, float]:
        """The statistics of a group; none if they could not be measured, since training needs none."""
        done = await asyncio.gather(*chunks)
        images, finite = [chunk.images for chunk in done], [one for chunk in done for one in chunk.finite]

        async def work(slot: Slot) -> Any:
            return (await call(slot, "measure", finite, *images, deadline=self.pool.deadline))[0]

        try:
            found: Mapping[str, float] = await self.pool.run(work)
        except PoolError:
            return {}
        return found


def image_metrics(groups: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every statistic over the groups that have it."""
    names = dict.fromkeys(name for group in groups for name in group)
    return {
        f"{IMAGE}{name}": statistics.fmean(group[name] for group in groups if name in group) for name in names
    }


class Guard:
    """Compares metrics with their values at the start; a pure function of the lines it has seen.

    A statistic of the images alarms when its mean over the last few steps differs from that of the first few
    by more than a share of it and by more than some standard deviations; a held-out reward (weight 0) when
    an evaluation is worse than the first by that share. Each alarms once.
    """

    def __init__(self, settings: GuardSettings, held_out: Sequence[str]) -> None:
        """``held_out`` names the metrics of rewards that only watch."""
        self.settings, self.held_out = settings, held_out
        self._seen: dict[str, list[float]] = {}
        self._alarmed: set[str] = set()

    def look(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """Take in a step's metrics; what drifted, by metric, with the numbers that show it."""
        if self.settings.action == "off":
            return {}
        watched = [name for name in metrics if name.startswith(IMAGE) or name in self.held_out]
        found = {}
        for name in watched:
            if metrics[name] is not None and math.isfinite(metrics[name]):
                self._seen.setdefault(name, []).append(float(metrics[name]))
            story = self._drift(name)
            if story and name not in self._alarmed:
                found[name] = story
                self._alarmed.add(name)
        return found

    def _drift(self, name: str) -> str:
        seen = self._seen.get(name, [])
        span = 1 if name in self.held_out else self.settings.steps
        if len(seen) < 2 * span:
            return ""
        first, last = seen[:span], seen[-span:]
        start, now = statistics.fmean(first), statistics.fmean(last)
        allowed = max(self.settings.change * abs(start), self.settings.sigmas * statistics.pstdev(first))
        risen = now > start
        if abs(now - start) <= allowed or (risen and name in self.held_out):
            return ""
        return f"{'rose' if risen else 'fell'} from {start:.3g} to {now:.3g}"


def watching_rewards(settings: RunSettings) -> list[str]:
    """The metrics of evaluation rewards without a weight: nobody optimises them, so they show who cheats."""
    return [f"eval_{reward.name}" for reward in settings.judges if reward.weight == 0]


def guard_of(settings: RunSettings, history: Iterable[Mapping[str, Any]]) -> Guard:
    """The guard of a run that has come as far as its history."""
    guard = Guard(settings.guard, watching_rewards(settings))
    for line in history:
        guard.look(line)
    return guard
