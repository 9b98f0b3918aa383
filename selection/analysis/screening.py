"""Screening: the power of a cheap preview's reward to predict the candidates of the widest margins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from selection.analysis.speedup import Interval, interval
from selection.strategies import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Agreement of previews and finished images: means over ``prompts`` prompts, with 95% intervals.

    Prompts whose final rewards are all equal are left out. ``correlation`` is Spearman's, within a prompt.
    ``captured`` compares the final rewards of the best and the worst half by preview: their difference over
    that of the best and worst halves by final reward; 1 is as good as the final rewards, 0 as chance.
    """

    correlation: Interval
    captured: Interval
    prompts: int


def agreement(previews: Floats, finals: Floats) -> Agreement:
    """Compare (P, n) rewards of previews with those of the finished images.

    Raises:
        ValueError: if no prompt's final rewards differ.
    """
    varied = np.ptp(finals, axis=1) > 0
    if not varied.any():
        raise ValueError("no prompt has final rewards that differ: nothing to predict")
    early, late = previews[varied], finals[varied]
    return Agreement(
        correlation=interval(_spearman(early, late)),
        captured=interval(_contrast(early, late) / _contrast(late, late)),
        prompts=int(varied.sum()),
    )


def _spearman(early: Floats, late: Floats) -> Floats:
    """Compute Spearman's correlation per prompt; 0 where all previews tie, since they predict nothing."""
    ranks = [stats.rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (early, late)]
    products = (ranks[0] * ranks[1]).sum(1)
    lengths = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    correlation: Floats = products / np.where(lengths > 0, lengths, 1.0)
    return correlation


def _contrast(chosen_by: Floats, rewards: Floats) -> Floats:
    """Compute the mean reward of the best half by ``chosen_by`` minus that of the worst; (P, n) to (P,).

    Ties share their places, so that tied candidates belong to the best half in equal parts.
    """
    count = rewards.shape[1]
    halves = np.sign(np.arange(count) - (count - 1) / 2)
    upto = np.concatenate([[0.0], halves.cumsum()])
    first, last = (stats.rankdata(chosen_by, method=which, axis=1).astype(int) for which in ("min", "max"))
    sides = (upto[last] - upto[first - 1]) / (last - first + 1)
    contrast: Floats = (sides * rewards).sum(1) / (count // 2)
    return contrast
