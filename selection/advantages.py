"""Advantages of the kept candidates, normalised after selection.

Standard deviations are those of the population, in float64, as in FlowGRPO. Clipping is the learner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from selection.settings import Normalisation
from selection.strategies import Floats, Indices

EPSILON: Final = 1e-4
"""Added to every standard deviation, as in FlowGRPO."""


def advantages(
    rewards: Floats,
    valid: NDArray[np.bool_],
    kept: Sequence[Indices],
    *,
    normalisation: Normalisation,
    rms_match: bool = False,
    tolerance: float = -1.0,
) -> tuple[Floats, ...]:
    """Compute A = (r - mean) / (std + 1e-4) of each group's kept candidates, in their order.

    ``rewards`` and ``valid`` are (P, n); ``kept`` has one index array per group, of valid candidates only.

    - ``candidates``: mean and std of all valid candidates of the group. Does not sum to zero over a
      lopsided subset, which rewards the event of being selected.
    - ``selected``: mean and std of the kept ones. A lone pair becomes +-1, however narrow its margin.
    - ``batch``: mean of the kept ones, std of all valid candidates of all groups that can be compared
      (two or more valid), not centred by prompt: keeps the size of margins, sums to zero. FlowGRPO's
      global std is this with everything kept.
    - ``ranks``: the share of the group's other valid candidates that are worse, minus that of better ones, in
      [-1, 1]. Half of it plus a half is the chance to be better than another candidate of the prompt.

    Selecting extremes enlarges advantages and so weakens beta. ``rms_match`` multiplies all of them by one
    number, so that their root mean square is what it would be if every valid candidate were kept under
    ``batch``, of groups whose margin is above ``tolerance``: the one reference for every strategy and
    normalisation.
    """
    comparable = valid & (valid.sum(axis=-1, keepdims=True) >= 2)
    spread = _std(rewards[comparable])
    raw = []
    for row, usable, chosen in zip(rewards, comparable, kept, strict=True):
        subset = row[chosen]
        if normalisation == "ranks":
            raw.append(_ranks(subset, row[usable]))
            continue
        pool = row[usable] if normalisation == "candidates" else subset
        scale = spread if normalisation == "batch" else _std(pool)
        raw.append((subset - pool.mean()) / (scale + EPSILON) if len(subset) else subset)
    if not rms_match:
        return tuple(raw)
    varied = [np.ptp(row[usable]) > tolerance if usable.any() else False
              for row, usable in zip(rewards, comparable, strict=True)]  # fmt: skip
    factor = _reference_rms(rewards[varied], comparable[varied], spread) / (rms(raw) or 1.0)
    return tuple(factor * row for row in raw)


def rms(values: Sequence[Floats]) -> float:
    """Compute the root mean square over all groups; 0 if they are empty."""
    flat = np.concatenate([np.zeros(0), *values])
    return float(np.sqrt(np.mean(flat**2))) if len(flat) else 0.0


def _ranks(subset: Floats, pool: Floats) -> Floats:
    """Compute the share of the pool that is worse, minus that of better ones; ``subset`` is part of it."""
    wins: Floats = np.sign(subset[:, None] - pool).sum(1)
    return wins / max(1, len(pool) - 1)


def _std(values: Floats) -> float:
    return float(np.std(values)) if len(values) else 0.0


def _reference_rms(rewards: Floats, comparable: NDArray[np.bool_], spread: float) -> float:
    groups = [row[usable] for row, usable in zip(rewards, comparable, strict=True)]
    return rms([(group - group.mean()) / (spread + EPSILON) for group in groups])
