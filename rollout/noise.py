"""Noise with an identity: the same candidate is the same noise on any worker, in any batch, in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rollout.records import Noise

if TYPE_CHECKING:
    from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from any sequence of names and numbers, independent of platform and process."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def candidate_noises(run_seed: int, prompt_index: int, group_id: int, count: int) -> tuple[Noise, ...]:
    """The seeds of a group's candidates: initial noise and SDE path are independent streams."""
    return tuple(
        Noise(
            initial=derive_seed("initial", run_seed, prompt_index, group_id, candidate),
            path=derive_seed("path", run_seed, prompt_index, group_id, candidate),
        )
        for candidate in range(count)
    )


def initial_latents(noises: Sequence[Noise], shape: tuple[int, ...]) -> Tensor:
    """Standard normal start states x_T, (N, *shape) float32 on the CPU."""
    return _normal([noise.initial for noise in noises], shape)


def path_noise(noises: Sequence[Noise], step: int, shape: tuple[int, ...]) -> Tensor:
    """Draw the standard normal noise of one step of the SDE, (N, *shape) float32 on the CPU."""
    return _normal([derive_seed(noise.path, step) for noise in noises], shape)


def _normal(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    # Drawn on the CPU one candidate at a time: a GPU's generator would depend on device and batch.
    import torch

    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)
