"""Evaluate on held-out prompts with fixed noise, drawn by the ODE with the averaged weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.loop.run import Run, Step
from cluster.loop.stages import Stages
from cluster.record.events import warn
from cluster.record.held_out import Drawn, eval_means, joined, mean
from cluster.record.nonfinite import EVAL_BROKEN, broken_held_out
from cluster.record.run_folder import RunFolder
from rewards.combine import Scores
from rollout.records import Handle, Weights

SHOWN: Final = 48
"""Held-out images that are saved as files; all are scored."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Held-out images: whether each is finite, their scores, and a handle of the images of every batch."""

    finite: Sequence[bool]
    scores: Scores
    images: Sequence[Handle]


async def evaluate(stages: Stages, version: int, drawn: Sequence[Drawn], batch: int) -> Evaluated:
    """Draw and score the held-out images with the average of the weights after ``version`` steps."""
    weights = await stages.averaged(version)
    parts = [drawn[i : i + batch] for i in range(0, len(drawn), batch)]
    done = await asyncio.gather(*(_evaluate_batch(stages, part, weights) for part in parts))
    return Evaluated(
        finite=[good for batch_done in done for good in batch_done.finite],
        scores=joined([batch_done.scores for batch_done in done]),
        images=[image for batch_done in done for image in batch_done.images],
    )


async def _evaluate_batch(stages: Stages, part: Sequence[Drawn], weights: Weights) -> Evaluated:
    prompts = [drawn.prompt for drawn in part]
    finite, images = await stages.draw(weights, prompts, [drawn.noise for drawn in part])
    return Evaluated(finite, await stages.score_held_out(images, prompts, finite), [images])


def evaluates(run: Run, step: int) -> bool:
    """Return whether a step has an evaluation: the start, the last, and one in ``eval_every`` steps."""
    return step in (0, run.settings.steps) or step % run.settings.eval_every == 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An observer that evaluates, saves the scores and some images, and adds the eval_* metrics."""

    folder: RunFolder
    drawn: Sequence[Drawn]

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        """Evaluate after the steps that `evaluates` names."""
        if not evaluates(run, step):
            return
        started, batch = time.perf_counter(), run.settings.rollout.batch
        found = await evaluate(run.stages, step, self.drawn, batch)
        images = [await run.stages.fetch(handle) for handle in found.images[: -(-SHOWN // batch)]]
        await asyncio.to_thread(self._save, step, found, images)
        metrics |= {
            **eval_means(found.scores),
            "eval_win_rate": _win_rate(self.folder, found.scores),
            EVAL_BROKEN: len(self.drawn) - sum(found.finite),
            "seconds_eval": time.perf_counter() - started,
        }

    def _save(self, step: int, found: Evaluated, images: Sequence[NDArray[np.uint8]]) -> None:
        shown = [image for part in images for image in part][:SHOWN]
        whole = [image if good else None for image, good in zip(shown, found.finite, strict=False)]
        self.folder.save_evaluation(step, self.drawn, found.scores, whole)
        self.folder.record_broken(step, broken_held_out(self.drawn, found.finite), "eval_images")


def _win_rate(folder: RunFolder, scores: Scores) -> float:
    """Return the share of images that score more than at the start; NaN if the start's scores are lost."""
    if not folder.start.exists():
        warn("win rate missing", reason=f"{folder.start} is lost")
        return float("nan")
    before = np.array(pq.read_table(folder.start)["reward"].to_pylist(), dtype=np.float64)
    return mean(np.where(np.isfinite(scores.total + before), scores.total > before, np.nan))
