"""The names of metrics where they leave the run: Ray and Prometheus take few characters, and one case."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

OURS: Final = ("reward", "strict", "win_rate", "diversity")
"""What an evaluation calls its own figures, after ``eval_``: no reward may be called so."""
_OF_STEP: Final = re.compile(r"(?P<name>.+)\.t(?P<step>\d+)")


def exported(metric: str) -> tuple[str, str]:
    """A metric's name in small ASCII letters, digits and underscores, and its denoising step; "" if of none.

    A reward may be called anything, and its evaluation is of no denoising step.
    """
    found = None if metric.startswith("eval_") else _OF_STEP.fullmatch(metric)
    name, step = found.group("name", "step") if found else (metric, "")
    return re.sub(r"[^A-Za-z0-9_]", "_", name).lower(), step


def check_rewards(names: Iterable[str]) -> None:
    """Raise ``ValueError`` when two rewards, or one and a figure of ours, would be exported as one metric."""
    taken = {exported(f"eval_{name}"): f"the evaluation's own figure {name}" for name in OURS}
    for name in names:
        key = exported(f"eval_{name}")
        if key in taken:
            raise ValueError(
                f"reward {name!r} and {taken[key]} would both be exported as {key[0]}; "
                f"give one a name of its own, and scorer"
            )
        taken[key] = f"reward {name!r}"
