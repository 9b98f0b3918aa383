"""The run's metrics on Ray's Prometheus endpoint, which prefixes every name with ``ray_``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ray.util.metrics import Gauge

from cluster.actors.stages import RayStages
from cluster.config.metric_names import exported

PREFIX: Final = "noisemargin"
FAMILIES: Final = {"seconds": "stage"}
"""First words of metric names that share one gauge, with the rest of the name as a tag."""


class Prometheus:
    """Gauges for every number of a metrics line, and for the current state of the pools.

    Tags are the run's name and a stage, reward or sampler: few, because each combination is a series, which
    Ray multiplies by its own tags.
    """

    def __init__(self, run: str, stages: RayStages) -> None:
        """Name the run; Ray must have been started."""
        self.run, self.stages = run, stages
        self.gauges: dict[str, Gauge] = {}

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Export one line of metrics; gauges of missing values (None, NaN) keep their last value."""
        for name, tags, value in (*_line(metrics), *_pools(self.stages)):
            if isinstance(value, int | float) and math.isfinite(value):
                self._gauge(name, tuple(tags)).set(float(value), {"run": self.run, **tags})

    def _gauge(self, name: str, tags: tuple[str, ...]) -> Gauge:
        if name not in self.gauges:
            self.gauges[name] = Gauge(f"{PREFIX}_{name}", f"{name} of the run", ("run", *tags))
        return self.gauges[name]


Sample = tuple[str, dict[str, str], Any]


def _line(metrics: Mapping[str, Any]) -> Iterator[Sample]:
    for name, value in metrics.items():
        family, _, rest = name.partition("_")
        valid, step = exported(name)
        if family in FAMILIES:
            yield family, {FAMILIES[family]: rest}, value
        elif step:
            yield f"step_{valid}", {"denoising_step": step}, value
        else:
            yield valid, {}, value
    if "valid" in metrics:
        yield "missing_rewards", {}, metrics["candidates"] - metrics["valid"]


def _pools(stages: RayStages) -> Iterator[Sample]:
    pools = {"sample": stages.samplers.pool, "select": stages.selector.pool}
    pools |= {name: pool.pool for name, pool in stages.rewards.replicas.items()}
    for stage, pool in pools.items():
        yield "queue", {"stage": stage}, pool.waiting
    for number, weights in stages.samplers.held.items():
        if not weights.averaged:  # not an evaluation's
            yield "weights_version", {"sampler": str(number)}, weights.version
