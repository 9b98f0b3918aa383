"""Images with known answers, which reveal wrong weights, labels or preprocessing of a reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rewards.check.pictures import picture
from rewards.scorer import RewardError
from rewards.worker import RewardWorker
from rollout.records import Prompt

_SCENES: Final = (("red", "circle"), ("blue", "square"), ("green", "triangle"), ("yellow", "cross"))
_WORDS: Final = ("ink", "fog", "map", "sun")
_SPARE: Final = 1
"""Prompts that a reward may get wrong: chance alone gets more wrong in 19 of 20 cases."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """The number of prompts (``texts``) for which a reward scored the prompt's own image highest."""

    texts: tuple[str, ...]
    right: int

    @property
    def enough(self) -> bool:
        """True if the reward did better than chance."""
        return self.right >= len(self.texts) - _SPARE


def recognised(worker: RewardWorker, scorer: type[Any], size: tuple[int, int]) -> Recognised | None:
    """Have a reward score drawn (width, height) images under each other's prompts.

    Returns None if it accepts no prompt whose image can be drawn, or ignores prompts.
    """
    for prompts in _questions():
        if not all(_takes(scorer, prompt) for prompt in prompts):
            continue
        try:
            scores = _table(worker, prompts, np.stack([picture(prompt, size) for prompt in prompts]))
        except RewardError:  # a served scorer may accept other prompts than its client
            continue
        blind = np.array_equal(scores, np.broadcast_to(scores[:1], scores.shape), equal_nan=True)
        if blind and _takes(scorer, Prompt(index=0, text="")):
            return None
        return Recognised(tuple(prompt.text for prompt in prompts), _right(scores))
    return None


def _questions() -> Iterator[list[Prompt]]:
    yield [
        Prompt(
            index=index,
            text=f"a photo of a {color} {shape}",
            metadata={"tag": "colors", "include": [{"class": shape, "count": 1, "color": color}]},
        )
        for index, (color, shape) in enumerate(_SCENES)
    ]
    yield [Prompt(index=i, text=f'a sign that says "{word}"') for i, word in enumerate(_WORDS)]


def _takes(scorer: type[Any], prompt: Prompt) -> bool:
    try:
        scorer.check(prompt)
    except ValueError:
        return False
    return True


def _table(worker: RewardWorker, prompts: Sequence[Prompt], images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Score every image under every prompt, (P, N); NaN where the score is missing."""
    count = len(images)
    asked = [prompt for prompt in prompts for _ in range(count)]
    found = worker.score(np.tile(images, (len(prompts), 1, 1, 1)), asked)
    return np.where(found.valid, found.values, np.nan).reshape(len(prompts), count)


def _right(scores: NDArray[np.float64]) -> int:
    """Count the prompts whose own image scores higher than all others; a missing score never does."""
    others = np.where(np.eye(len(scores), dtype=bool) | np.isnan(scores), -np.inf, scores)
    return int((np.diag(scores) > others.max(1)).sum())
