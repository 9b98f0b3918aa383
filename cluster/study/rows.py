"""Record a run of the study: a row per step, with its metrics and its costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.local.in_process import LocalStages
from cluster.loop.evaluation import evaluate, evaluates
from cluster.loop.run import Run, Step
from cluster.record.held_out import Drawn, eval_means
from cluster.record.nonfinite import BROKEN, EVAL_BROKEN
from rollout.records import Prompt


class RowRecorder:
    """An observer that records the metrics, the counts and the seconds of every step, and evaluates.

    Counts are rows of the transformer (``forwards``, ``backwards``), images (``sampled``, ``decodes``,
    ``trained``) and images times rewards (``scores``). Seconds are those of ``sample``, ``score`` and
    ``learn``, by the wall clock and (``cpu_seconds_...``) of the processor.
    """

    def __init__(self, stages: LocalStages, drawn: Sequence[Drawn]) -> None:
        """Evaluate on some held-out images; ``rows`` grows during the run."""
        self.stages, self.drawn = stages, drawn
        self.rows: list[dict[str, Any]] = []

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Add the row of a step."""
        row: dict[str, Any] = {"step": step}
        costs = self.stages.clock.take() | self.stages.meter.take()
        if made is not None:
            row |= _learnt(made) | dict(made.selection.metrics) | costs | _counts(run, made)
        if evaluates(run, step):
            row |= await self._evaluated(run, step)
        self.rows.append(row)

    async def _evaluated(self, run: Run, step: int) -> dict[str, float]:
        found = await evaluate(self.stages, step, self.drawn, run.settings.rollout.batch)
        await self.stages.load(step)
        seconds = self.stages.clock.take()
        self.stages.meter.take()
        seen = np.flatnonzero(found.finite)
        images = np.concatenate([await self.stages.fetch(part) for part in found.images])
        return {
            **eval_means(found.scores),
            "eval_diversity": diversity(images[seen], [self.drawn[place].prompt for place in seen]),
            EVAL_BROKEN: len(self.drawn) - len(seen),
            "seconds_eval": _total(seconds, "seconds_"),
            "cpu_seconds_eval": _total(seconds, "cpu_seconds_"),
        }


def _total(seconds: dict[str, float], clock: str) -> float:
    return sum(value for name, value in seconds.items() if name.startswith(clock))


def _learnt(made: Step) -> dict[str, float]:
    """Return the metrics of the update without those of single denoising steps."""
    metrics = made.update.metrics if made.update else {}
    return {name: value for name, value in metrics.items() if "." not in name}


def _counts(run: Run, made: Step) -> dict[str, int]:
    sampled = sum(len(group.noises) for group in made.groups)
    decoded = sampled + len(made.groups) * run.settings.selection.drafts
    return {
        BROKEN: sum("candidate" in image for produced in made.batch for image in produced.broken),
        "sampled": sampled,
        "trained": len(made.selection.kept),
        "decodes": decoded,
        "scores": decoded * len(run.settings.rewards),
    }


def diversity(images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> float:
    """Measure how much images of one prompt differ, by the root mean squared deviation of a pixel in [0, 1].

    NaN if every prompt has one image. A policy that collapses to one image per prompt has a value near 0.
    """
    numbers = np.array([prompt.index for prompt in prompts])
    scaled = images.astype(np.float64) / 255
    spreads = [
        scaled[numbers == n].var(0, ddof=1).mean() for n in np.unique(numbers) if (numbers == n).sum() > 1
    ]
    return float(np.sqrt(np.mean(spreads))) if spreads else float("nan")
