"""The covariance of per-trajectory policy gradients, split by prompt, to locate the signal.

Gradients are vectors g[p, i] of prompt p's candidate i: advantage (normalised within the group) times the
gradient of the log-probability. They may be random projections, which keep inner products on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selection.strategies import Floats, Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An unbiased estimate and its standard error, by the jackknife over prompts."""

    value: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Traces of the gradients' covariance, and the squared length of their mean.

    ``between`` is the variance of the prompts' expected gradients, ``within`` that of one candidate's
    gradient around its prompt's. Estimates of ``between`` and ``signal`` may be negative, due to noise.
    """

    prompts: int
    candidates: int
    between: Estimate
    within: Estimate
    signal: Estimate

    @property
    def noise_between(self) -> float:
        """Contribution of prompts to the variance of the batch's mean gradient."""
        return self.between.value / self.prompts

    @property
    def noise_within(self) -> float:
        """Contribution of candidates to the variance of the batch's mean gradient."""
        return self.within.value / (self.prompts * self.candidates)

    @property
    def snr_between(self) -> float:
        """Signal over the variance between prompts, for one prompt of infinitely many candidates."""
        return self.signal.value / self.between.value if self.between.value > 0 else float("inf")

    @property
    def snr_within(self) -> float:
        """Signal over the variance within prompts, for a single candidate."""
        return self.signal.value / self.within.value if self.within.value > 0 else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Mean properties of pairs of candidates by margin rank, widest pairs first, (K,) each.

    ``cosine`` is that of one prompt's pairs with the mean gradient of all other prompts, ``cosine_error`` its
    standard error over prompts, ``aligned`` the rank's share of the whole batch's gradient along it,
    ``pairs`` their number per prompt, and ``margin`` their mean difference of rewards.
    """

    cosine: Floats
    cosine_error: Floats
    aligned: Floats
    pairs: Indices
    margin: Floats


def split(gradients: Floats) -> Split:
    """Split the variance of (P, n, d) gradients by one-way analysis of variance, per coordinate.

    Raises:
        ValueError: with fewer than two prompts or candidates.
    """
    prompts, candidates = _sizes(gradients)
    means = gradients.mean(1)
    traces = ((gradients - means[:, None]) ** 2).sum((1, 2)) / (candidates - 1)
    found = _estimates(means, traces, candidates)
    errors = np.zeros(3)
    if prompts > 2:
        others = [np.arange(prompts) != left_out for left_out in range(prompts)]
        without = np.array([_estimates(means[rest], traces[rest], candidates) for rest in others])
        errors = np.sqrt((prompts - 1) * without.var(0))
    pairs = zip(found, errors, strict=True)
    between, within, signal = (Estimate(value=float(value), error=float(error)) for value, error in pairs)
    return Split(prompts=prompts, candidates=candidates, between=between, within=within, signal=signal)


def _estimates(means: Floats, traces: Floats, candidates: int) -> Floats:
    """Estimate between, within and signal, (3,), from prompts' mean gradients (P, d) and traces (P,)."""
    whole = means.mean(0)
    within = traces.mean()
    spread = ((means - whole) ** 2).sum() / (len(means) - 1)
    return np.array([spread - within / candidates, within, whole @ whole - spread / len(means)])


def by_margin_rank(gradients: Floats, rewards: Floats, ranks: int = 8) -> Ranks:
    """Compare the gradients (P, n, d) of nested pairs of (P, n) ``rewards`` with those of other prompts.

    Pairs are grouped into at most ``ranks`` ranks of about equal size. The reference of a prompt leaves
    that prompt out, so that no gradient is compared with itself.

    Raises:
        ValueError: with fewer than two prompts or candidates.
    """
    prompts, candidates = _sizes(gradients)
    order = np.argsort(rewards, axis=1, kind="stable")
    ranked = np.take_along_axis(gradients, order[:, :, None], axis=1)
    sorted_rewards = np.take_along_axis(rewards, order, axis=1)
    pairs = candidates // 2
    places = np.array_split(np.arange(pairs), min(ranks, pairs))
    starts = [int(rank[0]) for rank in places]
    counts = np.array([len(rank) for rank in places])
    summed = np.add.reduceat((ranked + ranked[:, ::-1])[:, :pairs], starts, axis=1)
    margins = (sorted_rewards[:, ::-1] - sorted_rewards)[:, :pairs].mean(0)
    means = gradients.mean(1)
    reference = (means.sum(0) - means) / (prompts - 1)
    along = np.einsum("pkd,pd->pk", summed, reference)
    cosine = along / np.maximum(_lengths(summed) * _lengths(reference)[:, None], np.finfo(np.float64).tiny)
    return Ranks(
        cosine=cosine.mean(0),
        cosine_error=cosine.std(0, ddof=1) / np.sqrt(prompts),
        aligned=along.sum(0) / np.einsum("pnd,pd->", gradients, reference),
        pairs=counts,
        margin=np.add.reduceat(margins, starts) / counts,
    )


def _lengths(vectors: Floats) -> Floats:
    lengths: Floats = np.linalg.norm(vectors, axis=-1)
    return lengths


def _sizes(gradients: Floats) -> tuple[int, int]:
    prompts, candidates = gradients.shape[:2]
    if min(prompts, candidates) < 2:
        raise ValueError(f"gradients need two prompts of two candidates at least, got {gradients.shape}")
    return prompts, candidates
