"""The speed-up of an arm: its cost to reach the baseline's final score, compared with the baseline's.

Held-out scores are noisy and their true curve is assumed to rise, so a curve is its isotonic regression (the
closest non-decreasing one), linear between evaluations. A running maximum would let luck count as
progress, more of it the noisier the arm; a moving mean would report every crossing late. The target is the
mean of the baseline's last three scores: less noise than in one of them, and never above the end of the
baseline's own isotonic curve, which therefore always reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
from scipy import optimize, stats

from selection.strategies import Floats, Indices

LAST: Final = 3
"""Evaluations whose mean is a final score."""

_DRAWS: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate over seeds with its interval; NaN bounds from a single seed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """The geometric mean of the cost ratios, baseline over arm, of ``seeds`` pairs of runs.

    ``reached`` seeds got to the target. The others count with the cost of the whole run, so that the ratio
    is then an upper bound.
    """

    ratio: Interval
    reached: int
    seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantage:
    """The geometric mean of two arms' cost ratios, ``other`` over ``arm``, of ``seeds`` pairs of runs.

    ``arm_reached`` and ``other_reached`` seeds got to the target; the others count with the whole run.
    """

    ratio: Interval
    arm_reached: int
    other_reached: int
    seeds: int

    @property
    def bound(self) -> str:
        """An upper bound (≤) if the arm's cost is unknown, a lower one (≥) if the other's is; for both ≶."""
        signs = {(True, True): "", (False, True): "≤", (True, False): "≥", (False, False): "≶"}
        return signs[self.arm_reached == self.seeds, self.other_reached == self.seeds]

    @property
    def sure(self) -> bool:
        """True if the arm costs less beyond the interval."""
        return self.ratio.low > 1 and self.bound in ("", "≥")


def final_score(scores: Floats) -> float:
    """Average the last three of a run's scores (all of them, if there are fewer)."""
    return float(np.mean(scores[-LAST:]))


def cost_to_reach(costs: Floats, scores: Floats, target: float) -> float:
    """Find the cost at which the isotonic curve of ``scores`` over rising ``costs`` first reaches ``target``.

    Returns infinity if it never does.

    Raises:
        ValueError: if costs do not rise, lengths differ or a value is not finite.
    """
    _check(costs, scores)
    curve = np.asarray(optimize.isotonic_regression(scores).x)
    above = np.flatnonzero(curve >= target - 1e-12)
    if not len(above):
        return float("inf")
    first = int(above[0])
    if first == 0:
        return float(costs[0])
    part = (target - curve[first - 1]) / (curve[first] - curve[first - 1])
    return float(costs[first - 1] + min(part, 1.0) * (costs[first] - costs[first - 1]))


def speedup(
    baseline: Sequence[tuple[Floats, Floats]], arm: Sequence[tuple[Floats, Floats]], seed: int = 0
) -> Speedup:
    """Compare (costs, scores) of an arm with those of the baseline, pair by pair.

    Each pair's target is its own baseline's final score. Costs count from 0 before training.

    Raises:
        ValueError: if there are no pairs, or a baseline has its final score before training.
    """
    pairs = [_ratio(*ours, *theirs) for theirs, ours in zip(baseline, arm, strict=True)]
    return Speedup(
        ratio=_geometric([ratio for ratio, _ in pairs], seed),
        reached=sum(reached for _, reached in pairs),
        seeds=len(pairs),
    )


def advantage(
    targets: Sequence[float],
    arm: Sequence[tuple[Floats, Floats]],
    other: Sequence[tuple[Floats, Floats]],
    seed: int = 0,
) -> Advantage:
    """Compare two arms' costs to the same targets: the geometric mean of other over arm, pair by pair.

    A run that never reaches its target counts as a whole.

    Raises:
        ValueError: if there are no pairs, or a value is not finite.
    """
    ours, theirs = (
        [_spent(*run, target) for target, run in zip(targets, runs, strict=True)] for runs in (arm, other)
    )
    ratios = [their / our for (our, _), (their, _) in zip(ours, theirs, strict=True)]
    return Advantage(
        ratio=_geometric(ratios, seed),
        arm_reached=sum(reached for _, reached in ours),
        other_reached=sum(reached for _, reached in theirs),
        seeds=len(ratios),
    )


def _geometric(ratios: Sequence[float], seed: int) -> Interval:
    """Compute the geometric mean of a few seeds' ratios with its interval."""
    found = interval(np.log(ratios), seed)
    value, low, high = (float(np.exp(x)) for x in (found.value, found.low, found.high))
    return Interval(value=value, low=low, high=high)


def interval(values: Floats, seed: int = 0, level: float = 0.95) -> Interval:
    """Compute the mean of a few seeds' values with its bootstrap interval.

    Percentiles of the resampled mean are too narrow for five seeds; they are widened according to Student's t
    and the missing factor n / (n - 1) (Hesterberg 2015, "expanded percentiles"). Up to six seeds, all
    resamples are used; beyond, ``seed`` draws ten thousand.

    Raises:
        ValueError: without values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(np.mean(values))
    if count == 1:
        return Interval(value=mean, low=float("nan"), high=float("nan"))
    tail = stats.norm.cdf(stats.t.ppf((1 - level) / 2, count - 1) * np.sqrt(count / (count - 1)))
    means = np.asarray(values)[_resamples(count, seed)].mean(1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(value=mean, low=float(low), high=float(high))


def paired_difference(baseline: Sequence[float], arm: Sequence[float], seed: int = 0) -> Interval:
    """Compute the arm's value minus the baseline's, pair by pair, with its interval."""
    return interval(np.asarray(arm, dtype=np.float64) - np.asarray(baseline, dtype=np.float64), seed)


def _resamples(count: int, seed: int) -> Indices:
    if count <= 6:
        return np.array(list(product(range(count), repeat=count)))
    return np.random.default_rng(seed).integers(count, size=(_DRAWS, count))


def _ratio(costs: Floats, scores: Floats, base_costs: Floats, base_scores: Floats) -> tuple[float, bool]:
    target = final_score(base_scores)
    theirs = cost_to_reach(base_costs, base_scores, target)
    if theirs <= 0:
        raise ValueError(f"the baseline is at its final score, {target:.4g}, before training")
    ours, reached = _spent(costs, scores, target)
    return theirs / ours, reached


def _spent(costs: Floats, scores: Floats, target: float) -> tuple[float, bool]:
    """Return the cost to reach a target, or else that of the whole run, and whether it was reached.

    A cost of 0 would give an infinite ratio: the first evaluation is the earliest that can be measured.
    """
    found = max(cost_to_reach(costs, scores, target), costs[costs > 0][0])
    return float(min(found, costs[-1])), bool(np.isfinite(found))


def _check(costs: Floats, scores: Floats) -> None:
    if len(costs) != len(scores) or len(costs) < 2 or np.any(np.diff(costs) <= 0):
        raise ValueError(f"a curve needs rising costs and as many scores, got {costs} and {scores}")
    if not np.isfinite(scores).all():
        raise ValueError(f"a curve needs finite scores, got {scores}")
