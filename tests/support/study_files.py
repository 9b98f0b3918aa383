"""A study on disk with a known truth, written without training anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cluster.study.compare import arm_path
from cluster.study.store import write_rows

RATES = {"flowgrpo": 3.0, "noise_margin_2x": 6.0, "random_2x": 3.0}
"""How fast each arm's held-out score rises towards 1; the margin arm needs half the steps."""


def write_study_files(folder: Path, *, seeds: int = 5, steps: int = 100) -> None:
    """Variance, gradients and runs of one task."""
    write_variance(folder)
    for arm, rate in RATES.items():
        for seed in range(seeds):
            about = {
                "task": "shapes",
                "arm": arm,
                "seed": seed,
                "config": f"seed = {seed}",
                "backward_cost": 2.0,
            }
            # The last two seeds were added later, by the same command.
            command = (
                f"python -m cluster.study compare shapes --seeds {3 if seed < 3 else seeds} --folder runs/x"
            )
            rows = arm_rows(rate, steps, oversample=1 if arm == "flowgrpo" else 2, seed=seed)
            write_rows(arm_path(folder, arm, seed), rows, {**about, "command": command})


def arm_rows(rate: float, steps: int, *, oversample: int, seed: int) -> list[dict[str, Any]]:
    """A step samples 64 or 128, trains 64 and takes 3 or 4 seconds; every fifth is evaluated."""
    luck = np.random.default_rng(seed).normal() * 0.1
    found: list[dict[str, Any]] = []
    for step in range(steps + 1):
        row: dict[str, Any] = {"step": step}
        if step:
            costs = {"sampled": 64 * oversample, "trained": 64, "forwards": 384 * oversample + 320}
            row |= costs | {"backwards": 320, "decodes": 64 * oversample, "scores": 64 * oversample}
            seconds = {"sample": float(oversample), "score": 0.5, "learn": 1.5}
            row |= {f"{clock}_{k}": v for k, v in seconds.items() for clock in ("seconds", "cpu_seconds")}
        if step % 5 == 0:
            score = 1 - np.exp(-rate * (1 + luck) * step / 100)
            row |= {
                "eval_reward": score,
                "eval_shapes": score,
                "eval_strict": 0.5 * score,
                "eval_diversity": 0.2,
            }
        found.append(row)
    return found


def write_variance(folder: Path, *, missing: bool = True) -> None:
    """12 prompts x 4 x 4, mostly the path's; prompt 3 lacks a reward, gradients of the first six prompts."""
    rng = np.random.default_rng(0)
    shape = (12, 4, 4)
    rewards = 0.5 + rng.normal(size=shape) + 0.5 * rng.normal(size=(12, 1, 1))
    scores = rng.normal(size=(6, 4, 4, 8))
    if missing:
        rewards[3, 0, 0] = np.nan
    places = [dict(zip(("prompt", "initial", "path"), map(int, at), strict=True)) for at in np.ndindex(shape)]
    about = {"task": "shapes", "seed": 0, "config": "", "command": "python -m cluster.study variance shapes"}
    rows = [{**p, "reward": float(rewards[tuple(p.values())])} for p in places]
    projected = [
        {**p, "score": scores[tuple(p.values())].astype(np.float32)} for p in places if p["prompt"] < 6
    ]
    write_rows(folder / "gradients.parquet", projected, about)
    write_rows(folder / "variance.parquet", rows, about)
