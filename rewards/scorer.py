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
"""Seconds that a server has to say whether it is there, after it failed to answer something else."""

ROUNDING: Final = 1e-6
"""How far outside its range a score may be."""


class RewardError(Exception):
    """A scorer could not judge its images; the pool retries and then marks them invalid."""


class Unavailable(RewardError):
    """What scores is away, whatever the images: the pool waits for its return as long as for a hung call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a pool has to know of a scorer before it places one.

    ``low`` and ``high`` bound the scores; ``groupwise`` says that scores of a group depend on each
    other, so that a group must not be split over calls. ``needs_gpu`` is a remark to the reader, which the
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
    all-or-nothing verdict (0 or 1) that evaluation reports beside the score. ``remark`` is what
    `rewards.worker` finds odd about the scores, though they stand; scorers leave it empty.
    """

    values: NDArray[np.float64]
    valid: NDArray[np.bool_]
    details: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    remark: str = ""


def missing(count: int) -> Judgement:
    """What is known of N images that could not be scored: nothing."""
    return Judgement(values=np.full(count, np.nan), valid=np.zeros(count, dtype=np.bool_))


def join(parts: Sequence[Judgement]) -> Judgement:
    """Several judgements as one; the verdict ``strict``, the one detail that is kept, may be NaN in parts."""
    details = {}
    if any("strict" in part.details for part in parts):
        verdicts = [part.details.get("strict", np.full(len(part.values), np.nan)) for part in parts]
        details["strict"] = np.concatenate(verdicts).astype(np.float64)
    return Judgement(
        values=np.concatenate([part.values for part in parts]),
        valid=np.concatenate([part.valid for part in parts]),
        details=details,
    )


def spread(judgement: Judgement, seen: Sequence[bool]) -> Judgement:
    """The judgement of those that were ``seen`` among all images: of the others nothing is known."""
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
    """What is wrong with scores outside the declared range, or nothing; NaN is not judged."""
    outside = scores[(scores < traits.low - ROUNDING) | (scores > traits.high + ROUNDING)]
    return f"scored {outside[0]:g}, but declares {traits.low:g} to {traits.high:g}" if len(outside) else ""


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

        The driver calls it on the class, before a run starts and without loading any weights, and adds the
        prompt's file and line to the message.
        """
        ...


def check_text(prompt: Prompt) -> None:
    """Raise ``ValueError`` when the prompt has no text: the ``check`` of rewards that compare with it."""
    if not visible(prompt.text):
        raise ValueError(f"expected a text, got {prompt.text!r}")
