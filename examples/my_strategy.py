"""A strategy that keeps the best and the average: the top candidates of each prompt, and those in the middle.

A selection strategy of your own is a pure function of a batch of rewards. README.md has the command that runs
it.
"""

from __future__ import annotations

import numpy as np

from selection.strategies import Batch, Indices, ranking


def best_and_middle(batch: Batch) -> tuple[Indices, ...]:
    """Keep the ``keep // 2`` best candidates of each group and as many around the median of the others."""
    return tuple(_of_group(order, batch, group) for group, order in enumerate(ranking(batch)))


def _of_group(order: Indices, batch: Batch, group: int) -> Indices:
    """Select from one group's valid candidates, which ``order`` lists from worst to best."""
    rewards, half = batch.rewards[group, order], batch.keep // 2
    if len(order) < 2 or rewards[-1] - rewards[0] <= batch.tolerance:
        return order[:0]
    best, rest = order[-half:], order[:-half]
    first = max(0, (len(rest) - half) // 2)
    return np.concatenate([rest[first : first + half], best])
