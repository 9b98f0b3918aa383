"""Compare images and held-out rewards with where they started: a guard against reward hacking."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from cluster.config.settings import GuardSettings, RunSettings
from cluster.loop.run import Run, Step

IMAGE: Final = "image_"
"""The prefix of image statistics among the metrics."""


def image_metrics(groups: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every statistic over the groups that have it."""
    names = dict.fromkeys(name for group in groups for name in group)
    return {
        f"{IMAGE}{name}": statistics.fmean(group[name] for group in groups if name in group) for name in names
    }


class DriftGuard:
    """An observer that compares metrics with their values at the start; a function of the lines it has seen.

    A statistic of the images alarms when its mean over the last few steps differs from that of the first few
    by more than a share of it and by more than some standard deviations; a held-out reward (weight 0) when
    an evaluation is worse than the first by that share. Each alarms once.
    """

    def __init__(self, settings: GuardSettings, held_out: Sequence[str]) -> None:
        """``held_out`` names the metrics of rewards that only watch."""
        self.settings, self.held_out = settings, held_out
        self.rebuild(())

    def rebuild(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Rebuild the state from a run's metrics so far."""
        self._seen: dict[str, list[float]] = {}
        self._alarmed: set[str] = set()
        for line in history:
            self.look(line)

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Add alarms to a step's metrics, also those of watching rewards; pause the run if asked to."""
        drifted = self.look(metrics)
        if drifted and self.settings.action == "pause":
            run.stop.set()
        if alarms := drifted | run.stages.alarms():
            metrics["alarms"] = alarms

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


def guard_of(settings: RunSettings) -> DriftGuard:
    """The guard of a run that has not begun."""
    return DriftGuard(settings.guard, watching_rewards(settings))
