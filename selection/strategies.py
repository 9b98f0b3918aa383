"""Selection strategies: pure, deterministic functions of a batch of rewards.

Every strategy ranks the valid candidates of a group by (reward, key). The keys are random but belong to the
candidates, so ties are broken without regard to order or worker, and permuting the candidates permutes the
selection. Only comparisons, differences and variances of rewards are used, so that a positive affine map of
the rewards changes nothing (as long as no margin crosses the tolerance).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rollout.named import imported
from selection.settings import StrategyName

Indices = NDArray[np.int64]
"""Positions of candidates within their group."""

Floats = NDArray[np.float64]
"""Rewards, margins or advantages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """P groups of n candidates: ``rewards`` (P, n), ``valid`` (P, n) and ``keys`` (P, n).

    Rewards of invalid candidates mean nothing (they may be NaN) and are never used. Keys are distinct
    random integers. ``keep`` is per group; margins at or below ``tolerance`` count as ties.
    """

    rewards: Floats
    valid: NDArray[np.bool_]
    keys: NDArray[np.uint64]
    keep: int
    tolerance: float


Strategy = Callable[[Batch], tuple[Indices, ...]]
"""A function that returns each group's kept candidates, worst first."""


def ranking(batch: Batch) -> tuple[Indices, ...]:
    """Rank the valid candidates of each group, worst first; empty where fewer than two are valid."""
    orders = np.lexsort((batch.keys, batch.rewards, ~batch.valid), axis=-1)
    counts = batch.valid.sum(axis=-1)
    return tuple(order[: count if count >= 2 else 0] for order, count in zip(orders, counts, strict=True))


def margins(ranked: Floats) -> Floats:
    """Compute the nested margins r(n+1-j) - r(j), j = 1 .. n // 2, of ascending (n,): never increasing."""
    pairs = len(ranked) // 2
    return ranked[::-1][:pairs] - ranked[:pairs]


def keep_all(batch: Batch) -> tuple[Indices, ...]:
    """Keep every valid candidate, whatever ``keep``, as FlowGRPO does."""
    return ranking(batch)


def keep_random(batch: Batch) -> tuple[Indices, ...]:
    """Keep ``keep`` candidates at random (those with the lowest keys): the control."""
    return tuple(
        _sample(order, keys, batch.keep) for order, keys in zip(ranking(batch), batch.keys, strict=True)
    )


def noise_margin(batch: Batch) -> tuple[Indices, ...]:
    """Keep the ``keep // 2`` widest nested pairs of each group: its worst and its best candidates.

    Pairs that tie are left out, so a group of equal rewards contributes nothing.
    """
    return tuple(
        _ends(order, int(np.sum(margins(rewards[order])[: batch.keep // 2] > batch.tolerance)))
        for order, rewards in zip(ranking(batch), batch.rewards, strict=True)
    )


def each_margin(batch: Batch, parts: Floats) -> tuple[Indices, ...]:
    """Keep the ``keep // 2`` widest pairs of each group, of which every reward in turn takes one.

    ``parts`` (R, P, n) are the weighted rewards, finite where ``batch.valid``. A reward takes the lowest and
    the highest of the candidates that are left, if they differ by more than the tolerance; else it passes
    its turn. With one reward this is `noise_margin`.
    """
    return tuple(
        _in_turn(order, parts[:, group], batch.keys[group], batch)
        for group, order in enumerate(ranking(batch))
    )


def max_variance(batch: Batch) -> tuple[Indices, ...]:
    """Keep the ``keep`` candidates of each group with the largest variance (PODS, arXiv 2504.13818).

    The best subset consists of the i highest and the ``keep`` - i lowest for some i; prefix sums try every i.
    Of equally good splits the most balanced wins. A group of equal rewards contributes nothing.
    """
    chosen = []
    for order, rewards in zip(ranking(batch), batch.rewards, strict=True):
        ranked = rewards[order]
        size = min(batch.keep, len(order))
        varied = len(order) > 0 and ranked[-1] - ranked[0] > batch.tolerance
        chosen.append(_split(order, size, _highest_count(ranked, size)) if varied else order[:0])
    return tuple(chosen)


def global_margin(batch: Batch) -> tuple[Indices, ...]:
    """Keep the widest pairs of the whole batch, under one budget of groups * ``keep`` candidates.

    A group's margins never increase, so it contributes a prefix of its nested pairs. Equal margins go first
    to groups that have fewer pairs so far, then by key. Groups without margins leave their share to others.
    """
    orders = ranking(batch)
    nested = [margins(rewards[order]) for order, rewards in zip(orders, batch.rewards, strict=True)]
    widths = np.concatenate(nested)
    group = np.repeat(np.arange(len(nested)), [len(row) for row in nested])
    depth = np.concatenate([np.arange(len(row)) for row in nested])
    widest = np.lexsort((_group_keys(batch)[group], depth, -widths))[: len(nested) * batch.keep // 2]
    pairs = np.bincount(group[widest[widths[widest] > batch.tolerance]], minlength=len(nested))
    return tuple(_ends(order, int(count)) for order, count in zip(orders, pairs, strict=True))


def prompt_filter(batch: Batch) -> tuple[Indices, ...]:
    """Keep whole groups by falling standard deviation: a choice of prompts, not of noise.

    The budget is groups * ``keep`` candidates, so that as many are sampled and trained as with the other
    strategies; the last group that fits only in part gives a random part. Groups of equals are left out.
    """
    orders = ranking(batch)
    ranked = [rewards[order] for order, rewards in zip(orders, batch.rewards, strict=True)]
    spread = np.array(
        [row.std() if len(row) and row[-1] - row[0] > batch.tolerance else 0.0 for row in ranked]
    )
    chosen = [order[:0] for order in orders]
    left = len(orders) * batch.keep
    for group in np.lexsort((_group_keys(batch), -spread)):
        if spread[group] == 0.0 or left < 2:
            break
        chosen[group] = _sample(orders[group], batch.keys[group], left)
        left -= len(chosen[group])
    return tuple(chosen)


def promising(rewards: Floats, valid: NDArray[np.bool_], keys: NDArray[np.uint64], count: int) -> Indices:
    """Choose ``count`` of n drafted candidates to finish, in rising order: the worst and the best half.

    Ties are broken by key; without enough valid drafts some invalid ones are added, since a failed draft
    says nothing about the image.
    """
    order = np.lexsort((keys, rewards, ~valid))
    seen = int(valid.sum())
    if seen < count:
        return np.sort(order[:count])
    low = count // 2
    return np.sort(np.concatenate([order[:low], order[seen - (count - low) : seen]]))


STRATEGIES: Final[Mapping[StrategyName, Strategy]] = {
    "all": keep_all,
    "random": keep_random,
    "noise_margin": noise_margin,
    "max_variance": max_variance,
    "global_margin": global_margin,
    "prompt_filter": prompt_filter,
}
"""The strategies by their names in the configuration."""


def load_strategy(name: str) -> Strategy:
    """Return the strategy of a name of `STRATEGIES`, or a user's own ``module:function``.

    A user's own is checked whenever it is called.

    Raises:
        ValueError: naming the key and the value, if the function is missing; from the strategy itself, if it
            keeps what it may not.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]  # type: ignore[index]
    try:
        own = imported(name)
    except ValueError as error:
        raise ValueError(f"selection.strategy: got {name!r}: {error}") from error
    if not callable(own):
        raise ValueError(f"selection.strategy: got {name!r}, expected a function of a Batch")
    return partial(_checked, name, own)


def check_strategy(name: str, candidates: int, keep: int) -> None:
    """Try a user's own strategy on a made-up batch, in which candidates tie and rewards are missing.

    Raises:
        ValueError: naming the key, the value and what was expected.
    """
    strategy = load_strategy(name)
    if name in STRATEGIES:
        return
    keys = np.arange(3 * candidates, dtype=np.uint64).reshape(3, candidates)
    rewards = np.random.default_rng(0).normal(size=keys.shape)
    rewards[1] = 0.5
    valid = np.ones(keys.shape, dtype=np.bool_)
    valid[0, 0] = valid[2, 1:] = False
    rewards[~valid] = np.nan
    strategy(Batch(rewards=rewards, valid=valid, keys=keys, keep=keep, tolerance=1e-6))


def _checked(name: str, own: Strategy, batch: Batch) -> tuple[Indices, ...]:
    try:
        kept = tuple(np.asarray(chosen, dtype=np.int64) for chosen in own(batch))
    except Exception as error:  # the function is the user's own and may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"selection.strategy: {name!r} failed on {len(batch.rewards)} groups: {reason}"
        ) from error
    if len(kept) != len(batch.rewards):
        raise ValueError(
            f"selection.strategy: {name!r} kept candidates of {len(kept)} groups, "
            f"expected an entry for each of {len(batch.rewards)}"
        )
    for chosen, valid in zip(kept, batch.valid, strict=True):
        places, allowed = chosen.tolist(), np.flatnonzero(valid).tolist()
        if len(set(places)) < len(places) or not set(places) <= set(allowed):
            raise ValueError(
                f"selection.strategy: {name!r} kept {places}, expected different ones of {allowed}, "
                "the valid candidates of the group"
            )
    return kept


def _split(order: Indices, size: int, highest: int) -> Indices:
    return np.concatenate([order[: size - highest], order[len(order) - highest :]])


def _ends(order: Indices, pairs: int) -> Indices:
    return _split(order, 2 * pairs, pairs)


def _sample(order: Indices, keys: NDArray[np.uint64], size: int) -> Indices:
    return order[np.sort(np.argsort(keys[order])[:size])]


def _in_turn(order: Indices, parts: Floats, keys: NDArray[np.uint64], batch: Batch) -> Indices:
    ranked = [order[np.lexsort((keys[order], part[order]))] for part in parts]
    taken = np.zeros(parts.shape[1], dtype=np.bool_)
    passed = 0
    for turn in cycle(range(len(parts))):
        if taken.sum() >= 2 * (batch.keep // 2) or passed == len(parts):
            break
        left = ranked[turn][~taken[ranked[turn]]]
        wide = len(left) >= 2 and parts[turn, left[-1]] - parts[turn, left[0]] > batch.tolerance
        taken[left[[0, -1]] if wide else left[:0]] = True
        passed = 0 if wide else passed + 1
    return order[taken[order]]


def _group_keys(batch: Batch) -> NDArray[np.uint64]:
    """Return one key per group, from its valid candidates: independent of order and padding."""
    keys: NDArray[np.uint64] = np.where(batch.valid, batch.keys, np.iinfo(np.uint64).max).min(axis=-1)
    return keys


def _highest_count(ranked: Floats, size: int) -> int:
    """Return how many of the ``size`` kept are the highest, for most variance; ``ranked`` must vary."""
    scaled = (ranked - ranked.mean()) / (ranked[-1] - ranked[0])
    first = np.concatenate([[0.0], np.cumsum(scaled)])
    second = np.concatenate([[0.0], np.cumsum(scaled**2)])
    high = np.arange(size + 1)
    low, rest = size - high, len(ranked) - high
    mean = (first[low] + first[-1] - first[rest]) / size
    variance = (second[low] + second[-1] - second[rest]) / size - mean**2
    # Rounding must not decide between splits that are equally good.
    best = np.flatnonzero(variance >= variance.max() - 1e-12)
    return int(best[np.argmin(np.abs(2 * best - size))])
