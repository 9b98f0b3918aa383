"""The interface of every reward, light enough for the driver to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rollout.records import Prompt
from rollout.text_files import visible

PROBE: Final = 5.0
"""Seconds that a server has to answer a health check after another request to it failed."""

ROUNDING: Final = 1e-6
"""Distance outside the declared range at which a score still counts as inside."""


class RewardError(Exception):
    """A scorer could not score its images; the pool retries and then marks them invalid."""


class Unavailable(RewardError):
    """The scoring backend cannot be reached, whatever the images.

    The pool waits for its return as long as for a hung call.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """The properties of a scorer that a pool needs before it places one.

    ``low`` and ``high`` bound the scores; ``groupwise`` means that scores of a group depend on each
    other, so that a group must not be split over calls. ``needs_gpu`` is a remark for the reader, which the
    reward server's protocol passes on; nothing acts on it.
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
    all-or-nothing score (0 or 1) that evaluation reports beside the value. ``remark`` is a warning that
    `rewards.worker` adds about scores that it accepts; scorers leave it empty.
    """

    values: NDArray[np.float64]
    valid: NDArray[np.bool_]
    details: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    remark: str = ""


def missing(count: int) -> Judgement:
    """Return the judgement of ``count`` images that could not be scored: NaN, and none valid."""
    return Judgement(values=np.full(count, np.nan), valid=np.zeros(count, dtype=np.bool_))


def join(parts: Sequence[Judgement]) -> Judgement:
    """Concatenate judgements; of the details only ``strict`` is kept, NaN for parts that lack it."""
    details = {}
    if any("strict" in part.details for part in parts):
        stricts = [part.details.get("strict", np.full(len(part.values), np.nan)) for part in parts]
        details["strict"] = np.concatenate(stricts).astype(np.float64)
    return Judgement(
        values=np.concatenate([part.values for part in parts]),
        valid=np.concatenate([part.valid for part in parts]),
        details=details,
    )


def spread(judgement: Judgement, seen: Sequence[bool]) -> Judgement:
    """Extend a judgement of the ``seen`` images to all images, of which the others are missing."""
    if all(seen):
        return judgement
    places = np.flatnonzero(seen)
    whole = missing(len(seen))
    whole.values[places], whole.valid[places] = judgement.values, judgement.valid
    details = {}
    if "strict" in judgement.details:
        details["strict"] = np.full(len(seen), np.nan)
        details["strict"][places] = judgement.details["strict"]
    return Judgement(values=whole.values, valid=whole.valid, details=details)


def stray(scores: NDArray[np.float64], traits: Traits) -> str:
    """Describe the first score outside the declared range; empty if all are inside. NaN is ignored."""
    outside = scores[(scores < traits.low - ROUNDING) | (scores > traits.high + ROUNDING)]
    return f"scored {outside[0]:g}, but declares {traits.low:g} to {traits.high:g}" if len(outside) else ""


@runtime_checkable
class Scorer(Protocol):
    """Scores images: (N, H, W, 3) uint8 and N prompts in, a `Judgement` of N out."""

    traits: ClassVar[Traits]

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Score every image against its prompt.

        Raises:
            RewardError: if the whole call failed.
        """
        ...

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Refuse a prompt that lacks what this reward needs.

        The driver calls it on the class, before a run starts and without loading any weights, and adds the
        prompt's file and line to the message.

        Raises:
            ValueError: if the prompt does not suit this reward.
        """
        ...


def check_text(prompt: Prompt) -> None:
    """Refuse a prompt without text: the ``check`` of rewards that compare images with it.

    Raises:
        ValueError: if the prompt has no visible character.
    """
    if not visible(prompt.text):
        raise ValueError(f"expected a text, got {prompt.text!r}")
