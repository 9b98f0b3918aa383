"""Stable Diffusion 3 with squared noise levels, so that more steps are near the image.

A model family of your own is a subclass of `DiffusersPolicy` or of one of the families. README.md has the
command that runs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rollout.families.sd3 import SD3


class LateStepsSD3(SD3):
    """SD3 with other noise levels: even ones, squared, before the scheduler shifts them."""

    def spacing(self, steps: int) -> dict[str, Any]:
        """Return the noise levels for the scheduler, from which sampler and learner take their schedule."""
        return {"sigmas": np.linspace(1.0, 0.05, steps) ** 2}
