"""Read the study's designs, variance and drafts, from their Parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.study.store import Row, read_rows
from rollout.records import Keep
from selection.analysis.gradients import Ranks, Split, by_margin_rank, split
from selection.analysis.screening import Agreement, agreement
from selection.analysis.variance import Component, components, estimate, group_normalised
from selection.strategies import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """The decomposition of policy gradients, with ``shares`` of their total variance by component."""

    split: Split
    shares: Mapping[str, float]
    ranks: Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Variance:
    """One task's design: components raw and after group-wise normalisation, and the gradients if measured.

    ``dropped`` prompts had a candidate without a valid reward, which a crossed design cannot contain.
    """

    task: str
    dynamics: str
    about: Row
    design: tuple[int, int, int]
    dropped: int
    mean: float
    raw: Mapping[str, Component]
    normalised: Mapping[str, Component]
    gradients: Gradients | None


DraftKey = tuple[str, int, float]
"""The kind of a draft (on the SDE's path, or an ODE of its own), its passes, and its noise level."""


def variance_path(folder: Path, dynamics: str) -> Path:
    """Return the path of the rewards of a design that an ODE samples, or that has SDE paths."""
    return folder / ("variance-ode.parquet" if dynamics == "ode" else "variance.parquet")


def gradients_path(folder: Path, dynamics: str) -> Path:
    """Return the path of a design's policy gradients."""
    return folder / ("gradients-ode.parquet" if dynamics == "ode" else "gradients.parquet")


def kept_fields(settings: RunSettings) -> frozenset[Keep]:
    """Name what samplers keep of a path, which the study reads whatever the objective; of an ODE nothing."""
    return frozenset() if settings.rollout.dynamics == "ode" else frozenset({"states", "log_probs"})


def load_variance(folder: Path, dynamics: str = "sde") -> Variance | None:
    """Load the variance design of a task's folder; None if it was not sampled.

    Raises:
        UserError: if a file is not the study's, or fewer than two prompts are complete.
    """
    path = variance_path(folder, dynamics)
    if not path.exists():
        return None
    rows, about = read_rows(path)
    rewards = _cube(rows, "reward")
    whole = np.isfinite(rewards).all((1, 2))
    if whole.sum() < 2:
        raise UserError(f"{folder}: only {whole.sum()} prompts have a valid reward for every candidate")
    kept = rewards[whole]
    return Variance(
        task=about["task"],
        dynamics=dynamics,
        about=about,
        design=(len(kept), *rewards.shape[1:]),
        dropped=int((~whole).sum()),
        mean=float(kept.mean()),
        raw=components(kept, seed=0),
        normalised=components(group_normalised(kept), seed=0),
        gradients=_gradients(gradients_path(folder, dynamics), rewards, whole),
    )


def drafts_path(folder: Path, dynamics: str) -> Path:
    """Return the path of the drafts of candidates that an ODE makes, or that stochastic steps make."""
    return folder / ("preview-ode.parquet" if dynamics == "ode" else "preview.parquet")


def load_drafts(folder: Path, dynamics: str) -> dict[DraftKey, Agreement]:
    """Measure how well drafts predict final rewards; empty if none were scored.

    Raises:
        UserError: if a file is not the study's, or no prompt's final rewards differ.
    """
    path = drafts_path(folder, dynamics)
    if not path.exists():
        return {}
    rows, _ = read_rows(path)
    found = {}
    kinds = [(row["kind"], row["passes"], row["sigma"]) for row in rows]
    for key in sorted(set(kinds), reverse=True, key=lambda kind: (kind[0], -kind[1])):
        chosen = [row for row, kind in zip(rows, kinds, strict=True) if kind == key]
        early, late = (_grid(chosen, name) for name in ("preview", "reward"))
        whole = np.isfinite(early + late).all(1)
        try:
            found[key] = agreement(early[whole], late[whole])
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from None
    return found


def _grid(rows: Sequence[Row], name: str) -> Floats:
    """Arrange a column by prompt and candidate."""
    prompts = sorted({row["prompt"] for row in rows})
    ordered = sorted(rows, key=lambda row: (row["prompt"], row["candidate"]))
    return np.array([row[name] for row in ordered], dtype=np.float64).reshape(len(prompts), -1)


def _cube(rows: Sequence[Row], name: str) -> Floats:
    """Arrange a column by prompt, initial noise and path, with further axes if its values are lists."""
    places = np.array([(row["prompt"], row["initial"], row["path"]) for row in rows])
    values = np.array([row[name] for row in rows], dtype=np.float64)
    cube = np.full((*(places.max(0) + 1), *values.shape[1:]), np.nan)
    cube[tuple(places.T)] = values
    return cube


def _gradients(path: Path, rewards: Floats, whole: Any) -> Gradients | None:
    """Multiply advantages and score functions, for the prompts whose rewards are complete and differ."""
    rows, _ = read_rows(path)
    if not rows:
        return None
    scores = _cube(rows, "score")
    usable = whole[: len(scores)] & (np.ptp(rewards[: len(scores)].reshape(len(scores), -1), axis=1) > 0)
    if usable.sum() < 2:
        return None
    kept = rewards[: len(scores)][usable]
    cube = group_normalised(kept)[..., None] * scores[usable]
    flat = cube.reshape(len(cube), -1, cube.shape[-1])
    traces = estimate(np.moveaxis(cube, -1, 0)).sum(1).clip(min=0)
    names = ("prompt", "initial", "interaction", "path")
    return Gradients(
        split=split(flat),
        shares=dict(zip(names, map(float, traces / traces.sum()), strict=True)),
        ranks=by_margin_rank(flat, kept.reshape(len(kept), -1)),
    )
