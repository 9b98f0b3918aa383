"""The names of exported metrics: Ray and Prometheus accept few characters, and only one case."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

RESERVED: Final = ("reward", "strict", "win_rate", "diversity")
"""The names, after ``eval_``, of an evaluation's own metrics: no reward may have them."""
_OF_STEP: Final = re.compile(r"(?P<name>.+)\.t(?P<step>\d+)")


def exported(metric: str) -> tuple[str, str]:
    """Return a metric's name in lower-case ASCII letters, digits and "_", and its denoising step or "".

    Rewards may have any name, also one like that of a denoising step's metric, so ``eval_*`` has no step.
    """
    found = None if metric.startswith("eval_") else _OF_STEP.fullmatch(metric)
    name, step = found.group("name", "step") if found else (metric, "")
    return re.sub(r"[^A-Za-z0-9_]", "_", name).lower(), step


def check_rewards(names: Iterable[str]) -> None:
    """Check that no reward's metric would be exported under the name of another one.

    Raises:
        ValueError: if two rewards, or a reward and an evaluation's own metric, share an exported name.
    """
    taken = {exported(f"eval_{name}"): f"the evaluation's own metric {name}" for name in RESERVED}
    for name in names:
        key = exported(f"eval_{name}")
        if key in taken:
            raise ValueError(
                f"reward {name!r} and {taken[key]} would both be exported as {key[0]}; "
                f"give one a name of its own, and scorer"
            )
        taken[key] = f"reward {name!r}"
