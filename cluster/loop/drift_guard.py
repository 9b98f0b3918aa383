"""Compare images and held-out rewards with the start of the run, against reward hacking."""

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
    """Average every statistic over the groups that have it."""
    names = dict.fromkeys(name for group in groups for name in group)
    return {
        f"{IMAGE}{name}": statistics.fmean(group[name] for group in groups if name in group) for name in names
    }


class DriftGuard:
    """An observer that compares metrics with their values at the start.

    A statistic of the images raises an alarm when its mean over the last few steps differs from that over the
    first few by more than a share of it and by more than some standard deviations; a watching reward, when an
    evaluation is worse than the first by that share. Each raises one alarm. The state is a function of the
    metrics so far.
    """

    def __init__(self, settings: GuardSettings, held_out: Sequence[str]) -> None:
        """Watch the images and the metrics ``held_out`` of watching rewards."""
        self.settings, self.held_out = settings, held_out
        self.rebuild(())

    def rebuild(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Rebuild the state by replaying a run's metrics so far."""
        self._seen: dict[str, list[float]] = {}
        self._alarmed: set[str] = set()
        for line in history:
            self.look(line)

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Add alarms and outages of watching rewards to a step's metrics, and pause the run if configured."""
        drifted = self.look(metrics)
        if drifted and self.settings.action == "pause":
            run.stop.set()
        if alarms := drifted | run.stages.alarms():
            metrics["alarms"] = alarms

    def look(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """Add a step's metrics, and return an alarm with its numbers for each metric that has drifted."""
        if self.settings.action == "off":
            return {}
        watched = [name for name in metrics if name.startswith(IMAGE) or name in self.held_out]
        alarms = {}
        for name in watched:
            if metrics[name] is not None and math.isfinite(metrics[name]):
                self._seen.setdefault(name, []).append(float(metrics[name]))
            message = self._drift(name)
            if message and name not in self._alarmed:
                alarms[name] = message
                self._alarmed.add(name)
        return alarms

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
    """List the metrics of evaluation rewards with weight 0: not optimised, they reveal reward hacking."""
    return [f"eval_{reward.name}" for reward in settings.eval_rewards_used if reward.weight == 0]


def drift_guard_of(settings: RunSettings) -> DriftGuard:
    """Make the drift guard of a run before its first step."""
    return DriftGuard(settings.guard, watching_rewards(settings))
