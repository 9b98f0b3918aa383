"""Stable Diffusion 3 with more of its steps near the image: noise levels that are squared.

A model family of your own is a class on `DiffusersPolicy`, or on one of the families. See README.md for how
to run it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rollout.families.sd3 import SD3


class LateStepsSD3(SD3):
    """All of SD3 but its noise levels: even steps squared, before the scheduler shifts them."""

    def spacing(self, steps: int) -> dict[str, Any]:
        """Give the scheduler these levels; sampler and learner both ask it for its schedule."""
        return {"sigmas": np.linspace(1.0, 0.05, steps) ** 2}
