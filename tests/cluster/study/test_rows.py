"""The rows of a run of the study."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.study.rows import diversity
from rollout.records import Prompt


def test_diversity_is_that_of_the_images_of_a_prompt() -> None:
    first, second = Prompt(index=0, text="a"), Prompt(index=1, text="b")
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    apart = np.concatenate([black, white])
    assert diversity(apart, [first, first]) == pytest.approx(np.sqrt(0.5))
    assert diversity(np.concatenate([black, black]), [first, first]) == 0.0
    assert np.isnan(diversity(apart, [first, second]))
