"""Allotment of noise in rounds: prompts whose margin is still narrow draw more candidates than others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rewards.combine import Scores
from selection.selector import tie_keys
from selection.settings import SelectionSettings
from selection.strategies import margins


def allotted(
    scores: Sequence[Scores], group_ids: Sequence[int], settings: SelectionSettings, seed: int
) -> list[int]:
    """Divide the candidates of a step that are left after the first round among its groups.

    The half of the groups with the narrowest kept margins share them evenly. A group whose candidates all tie
    comes last, since more noise most likely ties as well. A pure function of the scores so far: ties are
    broken by the groups' keys, and what cannot be divided goes to the narrowest.
    """
    widths = np.array([_kept_margin(score, settings) for score in scores])
    keys = np.array([int(tie_keys(seed, group, 1)[0]) for group in group_ids])
    order = np.lexsort((keys, widths, widths <= settings.tolerance))
    count = len(scores)
    chosen = order[: -(-count // 2)]
    share, rest = divmod(count * (settings.candidates - settings.adaptive), len(chosen))
    found = [0] * count
    for rank, group in enumerate(chosen):
        found[group] = share + (rank < rest)
    return found


def _kept_margin(scores: Scores, settings: SelectionSettings) -> float:
    """Compute the mean margin of the ``keep // 2`` widest pairs; 0 without two valid candidates."""
    valid: NDArray[np.bool_] = scores.valid & np.isfinite(scores.total)
    nested = margins(np.sort(scores.total[valid]))[: max(1, settings.keep // 2)]
    return float(nested.mean()) if len(nested) else 0.0
