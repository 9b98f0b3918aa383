"""Learning curves of the bundled composition task in emulated half precision.

``python -m tests.support.half_precision FOLDER SEED...`` runs what the folder lacks, one run after the other,
and prints the last held-out score, the mean of the last two, and both less those of float32, seed by seed.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final
from unittest import mock

from cluster.config.preflight import check
from cluster.config.sources import resolve
from cluster.local.in_process import load_scorers
from cluster.study.compare import run_arm
from tests.support.summation import load_rounding_policy

ARMS: Final[dict[str, tuple[str, str]]] = {
    "float32": ("float32", "sampler"),
    "float16": ("float16", "sampler"),
    "bfloat16": ("bfloat16", "sampler"),
    "bfloat16, the learner's old log-probs": ("bfloat16", "learner"),
}
"""The precision and the origin of the old log-probs."""


def curve(arm: str, seed: int) -> list[float]:
    """Train on `shapes`, where sums depend on the number of rows; return the held-out score every 10 steps.

    The learner's passes have another number of rows than the sampler's, so that they round differently.
    """
    dtype, old_log_probs = ARMS[arm]
    settings = resolve("shapes", {
        "seed": seed, "steps": 40, "eval_every": 10, "eval_samples": 2,
        "model": {"dtype": dtype}, "rollout": {"threads": 1},
        "learner": {
            "learning_rate": 1e-3, "micro_batch": 79, "threads": 1,
            "objective": {"old_log_probs": old_log_probs},
        },
    })  # fmt: skip
    with (
        mock.patch("rollout.worker.load_policy", load_rounding_policy),
        mock.patch("learner.worker.load_policy", load_rounding_policy),
    ):
        rows = run_arm(settings, settings.groups_per_step, check(settings), load_scorers(settings))
    return [row["eval_reward"] for row in rows if row.get("eval_reward") is not None]


def main(folder: Path, seeds: Sequence[int]) -> None:
    """Run every arm on every seed that has no file yet, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for number, arm in enumerate(ARMS):
            path = folder / f"{number}-{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(curve(arm, seed)))
            curves[arm].append(json.loads(path.read_text()))
    exact = curves["float32"]
    for arm, found in curves.items():
        print(f"{arm}: last {_compared(found, exact, last)}, of the last two {_compared(found, exact, late)}")


def last(scores: Sequence[float]) -> float:
    """Return the last score of a curve."""
    return scores[-1]


def late(scores: Sequence[float]) -> float:
    """Return the mean of the last two scores of a curve, which varies less than the last."""
    return statistics.mean(scores[-2:])


def _compared(
    found: Sequence[Sequence[float]],
    exact: Sequence[Sequence[float]],
    measure: Callable[[Sequence[float]], float],
) -> str:
    scores = [measure(one) for one in found]
    differences = [measure(one) - measure(other) for one, other in zip(found, exact, strict=True)]
    return f"{_spread(scores)}, less float32's {_spread(differences)}"


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]])
