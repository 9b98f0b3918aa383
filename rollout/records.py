"""The records that the stages exchange: frozen, complete at creation, one per edge of the data flow.

This module stays light (numpy only), so that the driver can use records without loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Handle = Any
"""Reference to a large value: a Ray ``ObjectRef`` in the service, the value itself without Ray."""

Keep = Literal["states", "log_probs", "means", "clean"]
"""Fields of a `Trajectory` that a sampler keeps if the objective needs them."""

NOT_KEPT: Final[NDArray[np.float32]] = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One line of a prompt file. ``index`` is its position there and identifies it; the text does not.

    ``origin`` is its file and line, FILE:LINE, for messages only: it is neither compared nor sent to reward
    servers.
    """

    index: int
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The identity of one candidate: the seed of its initial latents and the seed of its SDE path."""

    initial: int
    path: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """A request for candidates of one prompt, all or a chunk, under one policy version."""

    group_id: int
    prompt: Prompt
    noises: tuple[Noise, ...]
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One candidate's data for the learner: the states around every trained step, or its clean latents.

    ``steps`` (S,) names the stochastic steps of the schedule. Other fields are empty unless the objective
    needs them: ``states`` (S + 1, *latent shape) and ``clean`` (*latent shape), both in the storage dtype
    (bfloat16 as its int16 bits); ``log_probs`` (S,) and ``means`` (S, *latent shape), both float32, of the
    behaviour policy.
    """

    steps: NDArray[np.int64]
    states: NDArray[Any] = field(default_factory=lambda: NOT_KEPT)
    log_probs: NDArray[np.float32] = field(default_factory=lambda: NOT_KEPT)
    means: NDArray[np.float32] = field(default_factory=lambda: NOT_KEPT)
    clean: NDArray[Any] = field(default_factory=lambda: NOT_KEPT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A candidate after the steps of a draft: its state ``x``, float32, and its trajectory so far.

    ``states``, ``log_probs`` and ``means`` are as in `Trajectory`, and empty before the first trained step.
    """

    x: NDArray[np.float32]
    states: NDArray[Any]
    log_probs: NDArray[np.float32]
    means: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """The encoded prompt of a group, stored once: named arrays without a batch dimension."""

    arrays: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Candidates of a group that were sampled together: they can be scored while the rest is sampled.

    ``images`` (n, H, W, 3) uint8, ``conditioning`` and each trajectory are values of their own, so that Ray
    can free the unselected trajectories where they were made. A draft has `Begun` candidates for
    trajectories, or None, and no conditioning. Images whose latents or pixels are not ``finite`` are ignored.
    ``seconds`` is the chunk's share of its batch.
    """

    images: Handle
    finite: tuple[bool, ...]
    conditioning: Handle
    trajectories: tuple[Handle, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateGroup:
    """All candidates of one prompt: seeds, and handles of conditioning, trajectories and images by chunk."""

    group_id: int
    prompt: Prompt
    version: int
    noises: tuple[Noise, ...]
    images: tuple[Handle, ...]
    conditioning: Handle
    trajectories: tuple[Handle, ...]
    seconds: float


def group_of(request: SampleRequest, chunks: Sequence[Chunk], spent: float = 0.0) -> CandidateGroup:
    """Join the chunks of a request; ``spent`` seconds came before them."""
    return CandidateGroup(
        group_id=request.group_id,
        prompt=request.prompt,
        version=request.version,
        noises=request.noises,
        images=tuple(chunk.images for chunk in chunks),
        conditioning=chunks[0].conditioning,
        trajectories=tuple(handle for chunk in chunks for handle in chunk.trajectories),
        seconds=spent + sum(chunk.seconds for chunk in chunks),
    )


@dataclass(frozen=True, slots=True)
class WeightsId:
    """The identity of weights: the policy after ``version`` steps, or its average for evaluation."""

    version: int
    averaged: bool = False

    def __str__(self) -> str:
        """Write it as messages do: v3, or v3 (averaged)."""
        return f"v{self.version}" + " (averaged)" * self.averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Published weights: their identity, and handles of flat arrays in manifest order and of their checksums.

    The learner may still compute the later parts while the first ones are being transferred.
    """

    id: WeightsId
    checksums: tuple[Handle, ...]
    parts: tuple[Handle, ...]


class WeightsMismatch(RuntimeError):
    """Received weights differ from those that were sent, or do not fit this model."""
