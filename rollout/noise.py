"""Noise with an identity: the same candidate is the same noise on any worker, in any batch, in any order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

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
    """Draw the standard normal start states x_T, (N, *shape) float32 on the CPU."""
    return _normal([(noise.initial, 0) for noise in noises], shape)


def held_out_latents(noises: Sequence[Noise], shape: tuple[int, ...]) -> Tensor:
    """Draw the start states of held-out images, (N, *shape) float32 on the CPU.

    By torch's generator, of whose seed 32 bits count: so anyone can draw such an image again with diffusers.
    """
    import torch

    generators = [torch.Generator().manual_seed(noise.initial) for noise in noises]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def path_noise(noises: Sequence[Noise], step: int, shape: tuple[int, ...]) -> Tensor:
    """Draw the standard normal noise of one step of the SDE, (N, *shape) float32 on the CPU."""
    return _normal([(noise.path, step + 1) for noise in noises], shape)


def forward_noise(seeds: Sequence[int], draws: int, shape: tuple[int, ...]) -> Tensor:
    """Draw the standard normal noise of the forward process, (N * draws, *shape) float32 on the CPU.

    Each of N seeds has ``draws`` consecutive rows; what equal seeds share is drawn once.
    """
    places = {seed: place for place, seed in enumerate(dict.fromkeys(seeds))}
    drawn = _normal([(seed, draw) for seed in places for draw in range(draws)], shape)
    owners = [places[seed] for seed in seeds]
    rows: Tensor = drawn.view(len(places), draws, *shape)[owners].flatten(0, 1)
    return rows


def forward_times(seeds: Sequence[int], draws: int) -> list[float]:
    """Draw times in [0, 1) for `forward_noise`, for each seed one in each of ``draws`` equal intervals."""
    return [
        (draw + derive_seed("time", seed, draw) / 2**63) / draws for seed in seeds for draw in range(draws)
    ]


def _normal(keys: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> Tensor:
    """Draw a row per key of 2 x 64 bits, by Philox and the Box-Muller transform.

    Philox is counter-based (Salmon et al. 2011): all 128 bits of a key count, where torch's generators on the
    CPU reduce a seed to 32, so that two of 65,000 candidates would share their noise. It runs on the CPU,
    since a GPU's generator would depend on device and batch.
    """
    import torch

    numel = math.prod(shape)
    pairs = (numel + 1) // 2
    rows = torch.empty(len(keys), 2, pairs)
    for row, key in zip(rows, keys, strict=True):
        bits = np.random.Philox(key=key).random_raw(pairs).view(np.uint32)
        uniform = torch.from_numpy(bits).float().mul_(2.0**-32).view(2, pairs)
        radius = uniform[0].clamp_(min=2.0**-33).log_().mul_(-2).sqrt_()
        angle = uniform[1].mul_(2 * math.pi)
        torch.mul(radius, angle.cos(), out=row[0])
        torch.mul(radius, angle.sin(), out=row[1])
    return rows.flatten(1)[:, :numel].reshape(-1, *shape)
