"""The held-out images of a run: their prompts, their noise, and their scores as metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.config.settings import RunSettings
from rewards.combine import Scores
from rollout.noise import derive_seed
from rollout.records import Noise, Prompt


class Drawn(NamedTuple):
    """One held-out image: its prompt, its number among the prompt's images, and its noise."""

    prompt: Prompt
    sample: int
    noise: Noise


def held_out(prompts: Sequence[Prompt], settings: RunSettings) -> list[Drawn]:
    """Pair every held-out prompt with its noises, the same at every step of every run of this seed."""
    return [
        Drawn(prompt, sample, Noise(initial=derive_seed("eval", settings.seed, prompt.index, sample), path=0))
        for sample in range(settings.eval_samples)
        for prompt in prompts
    ]


def eval_means(scores: Scores) -> dict[str, float]:
    """Compute the eval_* metrics of held-out scores: means over the valid ones."""
    found = {"eval_reward": mean(scores.total)}
    if scores.strict is not None:
        found["eval_strict"] = mean(scores.strict)
    return found | {f"eval_{name}": mean(values) for name, values in scores.rewards.items()}


def joined(parts: Sequence[Scores]) -> Scores:
    """Join the scores of several batches of images."""
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


def mean(values: NDArray[np.float64]) -> float:
    """Average the finite values; NaN without any."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
