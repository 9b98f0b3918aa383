"""The worker of one replica of a reward: a plain class without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.registry import resolve
from rewards.scorer import Judgement, RewardError, Traits, Unavailable, stray
from rollout.records import Prompt


class RewardWorker:
    """A scorer behind checks: bad input, exceptions and non-finite scores never become a zero.

    ``name`` is a name of `rewards.registry` or a ``module:Class`` and ``options`` are its keyword arguments.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        """Create the scorer.

        Raises:
            RewardError: if the scorer cannot be created.
        """
        self.name = name
        try:
            self._scorer = resolve(name)(**options)
        except Exception as error:
            raise self._failed("could not be made", error) from error

    @property
    def traits(self) -> Traits:
        """The scorer's traits; a remote scorer has its range once it is created."""
        traits: Traits = self._scorer.traits
        return traits

    def ping(self) -> str:
        """Return the reward's name, which confirms that the worker responds."""
        return self.name

    def score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Score (N, H, W, 3) uint8 images; non-finite scores are marked as not valid.

        Scores outside the declared range are accepted, with a remark.

        Raises:
            RewardError: naming the reward and the cause, if the images have another shape or type, the
                scorer raises, or it does not return a judgement of N images.
        """
        self._check_images(images, prompts)
        try:
            judgement = self._scorer(images, prompts)
            found = _only_finite(judgement, len(prompts))
            return replace(found, remark=stray(found.values[found.valid], self.traits))
        except Exception as error:
            raise self._failed("failed", error) from error

    def score_ranges(
        self, ranges: Sequence[tuple[int, int]], prompts: Sequence[Prompt], *arrays: NDArray[np.uint8]
    ) -> Judgement:
        """Score images ``start`` to ``stop`` of each array as one batch.

        Pools call this in place of `score`, so that every array is sent whole and only once.

        Raises:
            RewardError: as `score` does.
        """
        parts = [images[start:stop] for images, (start, stop) in zip(arrays, ranges, strict=True)]
        return self.score(parts[0] if len(parts) == 1 else np.concatenate(parts), prompts)

    def _failed(self, what: str, error: Exception) -> RewardError:
        kind = Unavailable if isinstance(error, Unavailable) else RewardError
        return kind(f"reward {self.name!r} {what}: {type(error).__name__}: {error}")

    def _check_images(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> None:
        fits = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8 and images.size > 0
        if not fits or len(images) != len(prompts):
            raise RewardError(
                f"reward {self.name!r} expected (N, H, W, 3) uint8 images and N prompts, "
                f"got {images.shape} {images.dtype} and {len(prompts)} prompts"
            )


def _only_finite(judgement: Judgement, count: int) -> Judgement:
    values = np.asarray(judgement.values, dtype=np.float64)
    valid = np.asarray(judgement.valid, dtype=np.bool_)
    lengths = {"values": values.shape, "valid": valid.shape}
    lengths |= {name: np.shape(detail) for name, detail in judgement.details.items()}
    for name, shape in lengths.items():
        if shape != (count,):
            raise ValueError(f"{name} must have shape ({count},), got {shape}")
    return Judgement(values=values, valid=valid & np.isfinite(values), details=judgement.details)
