"""Evaluation: held-out prompts with fixed noise, sampled by the ODE with the averaged weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.actors.stages import Stages
from cluster.config.settings import RunSettings
from cluster.record.events import warn
from cluster.record.nonfinite import EVAL_BROKEN, broken_held_out
from cluster.record.run_folder import RunFolder
from rewards.combine import Scores
from rollout.noise import derive_seed
from rollout.records import Handle, Noise, Prompt, Weights

Drawn = tuple[Prompt, int, Noise]

SHOWN: Final = 48
"""Held-out images that are kept as files; all of them are scored."""


def held_out(prompts: Sequence[Prompt], settings: RunSettings) -> list[Drawn]:
    """Every held-out prompt with its fixed noises: the same at every step of every run of this seed."""
    return [
        (prompt, sample, Noise(initial=derive_seed("eval", settings.seed, prompt.index, sample), path=0))
        for sample in range(settings.eval_samples)
        for prompt in prompts
    ]


async def evaluate(
    stages: Stages, folder: RunFolder, step: int, drawn: Sequence[Drawn], weights: Weights, batch: int
) -> dict[str, float]:
    """Sample and score the held-out images, keep the record, return the eval_* metrics."""
    started = time.perf_counter()
    chunks = [drawn[i : i + batch] for i in range(0, len(drawn), batch)]
    done = await asyncio.gather(*(_evaluate_chunk(stages, chunk, weights) for chunk in chunks))
    scores = _joined([one.scores for one in done])
    broken = broken_held_out(drawn, [good for one in done for good in one.finite])
    images = [image for one in done[: -(-SHOWN // batch)] for image in await one.shown()]
    await asyncio.to_thread(folder.save_evaluation, step, drawn, scores, images[:SHOWN])
    await asyncio.to_thread(folder.record_broken, step, broken, "eval_images")
    return {
        **_metrics(folder, scores),
        EVAL_BROKEN: len(broken),
        "seconds_eval": time.perf_counter() - started,
    }


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """Some of the held-out images: which are finite, where all of them are, and the scores."""

    finite: Sequence[bool]
    images: Handle
    scores: Scores

    async def shown(self) -> list[NDArray[np.uint8] | None]:
        """The images, and none for one that is broken."""
        return [image if good else None for image, good in zip(await self.images, self.finite, strict=True)]


async def _evaluate_chunk(stages: Stages, chunk: Sequence[Drawn], weights: Weights) -> _Evaluated:
    prompts = [prompt for prompt, _, _ in chunk]
    finite, images = await stages.rollouts.evaluate(prompts, [noise for _, _, noise in chunk], weights)
    return _Evaluated(finite, images, await stages.rewards.judge(images, prompts, finite))


def _joined(parts: Sequence[Scores]) -> Scores:
    unknown = [np.full(len(part.total), np.nan) for part in parts]
    stricts = [
        none if part.strict is None else part.strict for none, part in zip(unknown, parts, strict=True)
    ]
    return Scores(
        rewards={k: np.concatenate([part.rewards[k] for part in parts]) for k in parts[0].rewards},
        weights=parts[0].weights,
        valid=np.concatenate([part.valid for part in parts]),
        total=np.concatenate([part.total for part in parts]),
        strict=None if all(part.strict is None for part in parts) else np.concatenate(stricts),
    )


def eval_means(scores: Scores) -> dict[str, float]:
    """The eval_* metrics of held-out scores: means over what is valid."""
    found = {"eval_reward": _mean(scores.total)}
    if scores.strict is not None:
        found["eval_strict"] = _mean(scores.strict)
    return found | {f"eval_{name}": _mean(values) for name, values in scores.rewards.items()}


def _metrics(folder: RunFolder, scores: Scores) -> dict[str, float]:
    return {**eval_means(scores), "eval_win_rate": _win_rate(folder, scores)}


def _win_rate(folder: RunFolder, scores: Scores) -> float:
    """The share of images that score more than at the start; NaN if the scores at the start are lost."""
    if not folder.start.exists():
        warn("win rate missing", reason=f"{folder.start} is lost")
        return float("nan")
    before = np.array(pq.read_table(folder.start)["reward"].to_pylist(), dtype=np.float64)
    return _mean(np.where(np.isfinite(scores.total + before), scores.total > before, np.nan))


def _mean(values: NDArray[np.float64]) -> float:
    valid = values[np.isfinite(values)]
    return float(valid.mean()) if len(valid) else float("nan")
