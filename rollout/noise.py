"""Noise with an identity: the same candidate is the same noise on any worker, in any batch, in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rollout.records import Noise
from rollout.settings import RolloutSettings

if TYPE_CHECKING:
    from torch import Tensor

MIRRORED: Final = 1 << 63
"""Set in the seed of an initial noise that is the negative of what the rest of the seed draws."""


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of names and numbers, independent of platform and process."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def candidate_noises(
    run_seed: int, prompt_index: int, group_id: int, count: int, rollout: RolloutSettings | None = None
) -> tuple[Noise, ...]:
    """The seeds of a group's candidates: initial noise and SDE path are independent streams.

    ``rollout`` may give the group a structure: ``branches`` candidates in a row share an initial noise, and
    antithetic ones come in pairs, the second the negative of the first.
    """
    branches, antithetic = (rollout.branches, rollout.antithetic) if rollout else (1, False)
    return tuple(
        Noise(
            initial=_initial(candidate // branches, antithetic, run_seed, prompt_index, group_id),
            path=derive_seed("path", run_seed, prompt_index, group_id, candidate),
        )
        for candidate in range(count)
    )


def _initial(number: int, antithetic: bool, *place: int) -> int:
    mirrored = number % 2 if antithetic else 0
    return derive_seed("initial", *place, number - mirrored) | MIRRORED * mirrored


def initial_latents(noises: Sequence[Noise], shape: tuple[int, ...]) -> Tensor:
    """Standard normal start states x_T, (N, *shape) float32 on the CPU."""
    drawn = _normal([noise.initial & ~MIRRORED for noise in noises], shape)
    for row, noise in zip(drawn, noises, strict=True):
        if noise.initial & MIRRORED:
            row.neg_()
    return drawn


def path_noise(noises: Sequence[Noise], step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of one step of the SDE, (N, *shape) float32 on the CPU."""
    return _normal([derive_seed(noise.path, step) for noise in noises], shape)


def _normal(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    # Drawn on the CPU one candidate at a time: a GPU's generator would depend on device and batch.
    import torch

    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)
