"""The interface of every reward, light enough for the driver to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rollout.records import Prompt


class RewardError(Exception):
    """A scorer could not judge its images; the pool retries and then marks them invalid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a pool has to know of a scorer before it places one.

    ``low`` and ``high`` bound the scores; ``groupwise`` says that scores of a group depend on each
    other, so that a group must not be split over calls.
    """

    low: float
    high: float
    thread_safe: bool = False
    needs_gpu: bool = False
    groupwise: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Scores of N images: ``values`` (N,) float64, ``valid`` (N,) bool, ``details`` named (N,) arrays.

    A value whose ``valid`` is False means nothing. ``details["strict"]``, where given, is the
    all-or-nothing verdict (0 or 1) that evaluation reports beside the score.
    """

    values: NDArray[np.float64]
    valid: NDArray[np.bool_]
    details: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@runtime_checkable
class Scorer(Protocol):
    """Judges images: (N, H, W, 3) uint8 and N prompts in, a `Judgement` of N out."""

    traits: ClassVar[Traits]

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Score every image against its prompt; raise `RewardError` when the whole call failed."""
        ...

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Raise ``ValueError`` when a prompt lacks what this reward needs.

        The driver calls it on the class, before a run starts and without loading any weights.
        """
        ...
