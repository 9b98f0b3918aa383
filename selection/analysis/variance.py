"""Variance components of the reward in a crossed, nested design, with intervals.

P prompts, Z initial noises, the same ones under every prompt, and E SDE paths in each of the P x Z cells:

    r[p, z, e] = mean + prompt[p] + initial[z] + interaction[p, z] + path[p, z, e]

All four effects are random and uncorrelated. Initial noise is *state*: a policy cannot choose it, so the
variance of ``initial`` and ``interaction`` earns no credit by the score function and could be removed by a
baseline that depends on the noise. Only ``path`` is the policy's own action.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from selection.advantages import EPSILON
from selection.strategies import Floats

COMPONENTS: Final = ("prompt", "initial", "interaction", "path")
"""The rows of every array of components, in this order."""

_DRAWS: Final = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """A variance with its interval, and its share of the total with the share's interval.

    ``variance`` and its interval are unbiased and so may be negative; shares count negative ones as zero.
    """

    variance: float
    low: float
    high: float
    share: float
    share_low: float
    share_high: float


def mean_squares(values: Floats) -> Floats:
    """Compute (4, ...) mean squares of prompts, initial noises, cells and paths, of (..., P, Z, E) values.

    Raises:
        ValueError: if P, Z or E is below 2 or a value is not finite.
    """
    _check(values)
    p, z, e = values.shape[-3:]
    cells = values.mean(-1)
    rows, columns = cells.mean(-1, keepdims=True), cells.mean(-2, keepdims=True)
    whole = cells.mean((-2, -1), keepdims=True)
    return np.stack(
        [
            z * e * ((rows - whole) ** 2).sum((-2, -1)) / (p - 1),
            p * e * ((columns - whole) ** 2).sum((-2, -1)) / (z - 1),
            e * ((cells - rows - columns + whole) ** 2).sum((-2, -1)) / ((p - 1) * (z - 1)),
            ((values - cells[..., None]) ** 2).sum((-3, -2, -1)) / (p * z * (e - 1)),
        ]
    )


def estimate(values: Floats) -> Floats:
    """Estimate (4, ...) variance components of (..., P, Z, E) values by ANOVA, unbiased.

    Source: Searle 1992, chapter 4.
    """
    return _solve(mean_squares(values), values.shape[-3:])


def components(values: Floats, seed: int, level: float = 0.95) -> Mapping[str, Component]:
    """Estimate the components of (P, Z, E) values with intervals of coverage ``level``, by name."""
    found = estimate(values)
    draws = component_draws(values, seed)
    low, high = np.quantile(draws, _tails(level), axis=1)
    shares = _shares(found[:, None])[:, 0]
    share_low, share_high = np.quantile(_shares(draws), _tails(level), axis=1)
    rows = zip(found, low, high, shares, share_low, share_high, strict=True)
    return {name: Component(**_fields(row)) for name, row in zip(COMPONENTS, rows, strict=True)}


def component_draws(values: Floats, seed: int, draws: int = _DRAWS) -> Floats:
    """Draw (4, draws, ...) components of (..., P, Z, E) values by parametric bootstrap.

    Each mean square is divided by an independent chi-squared variable over its degrees of freedom
    (Weerahandi's generalised pivot), and the components are solved from the result. Degrees of freedom are
    the design's, or fewer where the prompts' contributions to a mean square spread more than normal ones do
    (Satterthwaite's rule), as when prompts differ in their variance. A bootstrap that resamples prompts and
    noises covers too seldom here, since eight noises are too few to represent their distribution.
    """
    squares, freedom = mean_squares(values), _degrees_of_freedom(values)
    shape = (4, draws, *squares.shape[1:])
    chi2 = np.random.default_rng(seed).chisquare(np.broadcast_to(freedom[:, None], shape))
    return _solve(squares[:, None] * freedom[:, None] / chi2, values.shape[-3:])


def group_normalised(values: Floats) -> Floats:
    """Normalise (P, Z, E) values to group-wise advantages: minus the prompt's mean, over its deviation.

    The prompt's component is then zero by construction.
    """
    centred = values - values.mean((-2, -1), keepdims=True)
    normalised: Floats = centred / (values.std((-2, -1), keepdims=True) + EPSILON)
    return normalised


def _solve(squares: Floats, design: tuple[int, ...]) -> Floats:
    p, z, e = design
    prompts, noises, cells, paths = squares
    return np.stack(
        [(prompts - cells) / (z * e), (noises - cells) / (p * e), (cells - paths) / e, paths],
    )


def _degrees_of_freedom(values: Floats) -> Floats:
    p, z, e = values.shape[-3:]
    main, crossed, paths = _per_prompt(values)
    rows = _effective(main, p - 1)
    return np.stack(
        [
            rows,
            np.full_like(rows, z - 1),
            _effective(crossed, (p - 1) * (z - 1)),
            _effective(paths, p * z * (e - 1)),
        ]
    )


def _per_prompt(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Compute each prompt's contributions (..., P) to three mean squares, up to a factor.

    These are the mean squares of prompts, cells and paths.
    """
    cells = values.mean(-1)
    rows, columns = cells.mean(-1, keepdims=True), cells.mean(-2, keepdims=True)
    whole = cells.mean((-2, -1), keepdims=True)
    main = (rows - whole)[..., 0] ** 2
    crossed = ((cells - rows - columns + whole) ** 2).sum(-1)
    return main, crossed, ((values - cells[..., None]) ** 2).sum((-2, -1))


def _effective(parts: Floats, most: int) -> Floats:
    """Estimate a mean's degrees of freedom from (..., P) parts: its square over half its variance.

    The result is clipped to 1 to ``most``.
    """
    spread = parts.var(-1, ddof=1) / parts.shape[-1]
    found = 2 * parts.mean(-1) ** 2 / np.maximum(spread, np.finfo(np.float64).tiny)
    clipped: Floats = np.clip(found, 1.0, most)
    return clipped


def _shares(variances: Floats) -> Floats:
    """Compute (4, N) shares of (4, N) variances; all zero where the total is zero."""
    positive = np.maximum(variances, 0.0)
    total = positive.sum(0)
    shares: Floats = positive / np.where(total > 0, total, 1.0)
    return shares


def _fields(row: tuple[np.float64, ...]) -> dict[str, float]:
    names = ("variance", "low", "high", "share", "share_low", "share_high")
    return dict(zip(names, map(float, row), strict=True))


def _tails(level: float) -> NDArray[np.float64]:
    return np.array([(1 - level) / 2, (1 + level) / 2])


def _check(values: Floats) -> None:
    if values.ndim < 3 or min(values.shape[-3:]) < 2:
        raise ValueError(
            f"a design needs two prompts, two initial noises and two paths at least, got {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite")
