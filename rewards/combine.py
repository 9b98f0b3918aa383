"""Combine the judgements of several rewards into one total per candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.scorer import Judgement


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The scores of a group of n candidates.

    ``rewards`` holds (n,) float64 per reward and ``total`` (n,) float64, both NaN where not valid;
    ``valid`` is (n,) bool; ``strict`` is the (n,) all-or-nothing verdict of the first reward that has one.
    """

    rewards: Mapping[str, NDArray[np.float64]]
    valid: NDArray[np.bool_]
    total: NDArray[np.float64]
    strict: NDArray[np.float64] | None


def combine(judgements: Mapping[str, Judgement], weights: Mapping[str, float]) -> Scores:
    """The weighted sum of raw scores; a missing reward is never zero.

    A candidate is valid only if every reward with a non-zero weight is; a reward of weight zero is merely
    recorded. Raises ``ValueError`` when names or lengths of judgements and weights do not fit each other.
    """
    _check(judgements, weights)
    rewards = {name: np.where(j.valid, j.values, np.nan) for name, j in judgements.items()}
    counted = [name for name in judgements if weights[name] != 0.0]
    valid = np.logical_and.reduce([judgements[name].valid for name in counted])
    total = np.sum([weights[name] * rewards[name] for name in counted], axis=0)
    stricts = [j.details["strict"] for j in judgements.values() if "strict" in j.details]
    strict = np.asarray(stricts[0], dtype=np.float64) if stricts else None
    return Scores(rewards=rewards, valid=valid, total=np.where(valid, total, np.nan), strict=strict)


def _check(judgements: Mapping[str, Judgement], weights: Mapping[str, float]) -> None:
    if set(judgements) != set(weights):
        raise ValueError(f"rewards {sorted(judgements)} do not fit the weights of {sorted(weights)}")
    if not any(weights.values()):
        raise ValueError(f"at least one reward must have a non-zero weight, got {dict(weights)}")
    if not np.all(np.isfinite(list(weights.values()))):
        raise ValueError(f"weights must be finite, got {dict(weights)}")
    lengths = {name: len(j.values) for name, j in judgements.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"rewards judged different numbers of candidates: {lengths}")
