"""Combine the judgements of several rewards into one total per candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rewards.scorer import Judgement
from rewards.settings import Combination

SPREAD_FLOOR: Final = 1e-8
"""A standard deviation at or below this is rounding error: the reward does not separate the candidates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The scores of a group of n candidates.

    ``rewards`` holds the raw (n,) float64 of every reward and ``weights`` its weight; ``total`` (n,) float64
    is what selection and training use. Both are NaN where not valid. ``valid`` is (n,) bool; ``strict`` is
    the (n,) all-or-nothing score of the first reward that has one, NaN where that reward is missing.
    """

    rewards: Mapping[str, NDArray[np.float64]]
    weights: Mapping[str, float]
    valid: NDArray[np.bool_]
    total: NDArray[np.float64]
    strict: NDArray[np.float64] | None

    @property
    def weighted(self) -> dict[str, NDArray[np.float64]]:
        """Weight times raw score of every reward whose weight is not zero."""
        return {name: weight * self.rewards[name] for name, weight in self.weights.items() if weight != 0.0}

    @property
    def raw(self) -> NDArray[np.float64]:
        """Weighted sum (n,) of raw scores, comparable across steps even if ``total`` is standardised."""
        return np.asarray(np.sum(list(self.weighted.values()), axis=0))


def combine(
    judgements: Mapping[str, Judgement], weights: Mapping[str, float], how: Combination = "raw"
) -> Scores:
    """Sum the weighted scores of every candidate; a missing reward is never zero.

    ``standardised`` first brings every reward to mean 0 and (population) standard deviation 1 over the
    group's valid candidates, so that the reward with the widest scale does not dominate; a reward that does
    not separate the candidates adds 0. A candidate is valid only if every reward with a non-zero weight is;
    a reward of weight zero is only recorded.

    Raises:
        ValueError: if the names or lengths of judgements and weights do not match.
    """
    _check(judgements, weights)
    rewards = {name: np.where(j.valid, j.values, np.nan) for name, j in judgements.items()}
    counted = [name for name in judgements if weights[name] != 0.0]
    valid = np.logical_and.reduce([judgements[name].valid for name in counted])
    parts = {
        name: standardise(rewards[name], valid) if how == "standardised" else rewards[name]
        for name in counted
    }
    total = np.sum([weights[name] * part for name, part in parts.items()], axis=0)
    stricts = [
        np.where(j.valid, np.asarray(j.details["strict"], dtype=np.float64), np.nan)
        for j in judgements.values()
        if "strict" in j.details
    ]
    return Scores(
        rewards=rewards,
        weights={name: weights[name] for name in judgements},
        valid=valid,
        total=np.where(valid, total, np.nan),
        strict=stricts[0] if stricts else None,
    )


def standardise(values: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Express (n,) values in standard deviations from the mean of the valid ones; 0 if those are equal."""
    known = values[valid]
    spread = float(np.std(known)) if len(known) else 0.0
    if spread <= SPREAD_FLOOR:
        return np.zeros_like(values)
    return np.asarray((values - known.mean()) / spread)


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
