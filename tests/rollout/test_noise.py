"""Noise has an identity: it belongs to the candidate, not to the batch, the order or the process."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rollout.noise import candidate_noises, derive_seed, initial_latents, path_noise
from rollout.records import Noise

SHAPE = (2, 3, 4)
SEEDS = st.integers(0, 2**63 - 1)
NOISES = st.builds(Noise, initial=SEEDS, path=SEEDS)


@given(st.lists(NOISES, min_size=1, max_size=5), st.randoms(), st.integers(0, 40))
def test_a_candidate_has_its_noise_in_any_batch_and_order(
    noises: list[Noise], random: np.random.Generator, step: int
) -> None:
    order = list(range(len(noises)))
    random.shuffle(order)
    moved = [noises[i] for i in order]
    assert torch.equal(initial_latents(moved, SHAPE), initial_latents(noises, SHAPE)[order])
    assert torch.equal(path_noise(moved, step, SHAPE), path_noise(noises, step, SHAPE)[order])
    for row, noise in zip(initial_latents(noises, SHAPE), noises, strict=True):
        assert torch.equal(row, initial_latents([noise], SHAPE)[0])


def test_noise_ignores_and_leaves_the_global_generator() -> None:
    noises = candidate_noises(0, 0, 0, 2)
    torch.manual_seed(1)
    first = initial_latents(noises, SHAPE)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert torch.equal(first, initial_latents(noises, SHAPE))
    assert torch.equal(state, torch.random.get_rng_state())


def test_every_seed_of_a_run_differs() -> None:
    seeds = [
        seed
        for run, prompt, group in product(range(3), range(6), range(6))
        for noise in candidate_noises(run, prompt, group, 8)
        for seed in (noise.initial, noise.path)
    ]
    assert len(set(seeds)) == len(seeds)


def test_more_candidates_leave_the_first_ones_alone() -> None:
    assert candidate_noises(1, 2, 3, 16)[:4] == candidate_noises(1, 2, 3, 4)


def test_the_streams_are_standard_normal_and_uncorrelated() -> None:
    noises = candidate_noises(0, 0, 0, 64)
    streams = [
        initial_latents(noises, (16, 16)),
        path_noise(noises, 0, (16, 16)),
        path_noise(noises, 1, (16, 16)),
    ]
    table = np.corrcoef(torch.stack(streams).flatten(1).numpy())
    assert np.abs(table - np.eye(3)).max() < 0.03
    for stream in streams:
        assert abs(stream.mean()) < 0.03
        assert abs(stream.std() - 1) < 0.03


def test_one_stream_moves_without_the_other() -> None:
    same_start = [Noise(initial=5, path=1), Noise(initial=5, path=2)]
    first, second = initial_latents(same_start, SHAPE)
    assert torch.equal(first, second)
    first, second = path_noise(same_start, 0, SHAPE)
    assert not torch.equal(first, second)


def test_every_bit_of_a_seed_counts() -> None:
    flipped = [Noise(initial=2**bit, path=2**bit) for bit in range(63)]
    for rows in (initial_latents(flipped, SHAPE), path_noise(flipped, 0, SHAPE)):
        assert len({tuple(row.flatten().tolist()) for row in rows}) == 63


def test_equal_seeds_of_start_and_path_are_different_noise() -> None:
    noise = [Noise(initial=7, path=7)]
    streams = [initial_latents(noise, SHAPE), *(path_noise(noise, step, SHAPE) for step in range(3))]
    assert len({tuple(stream.flatten().tolist()) for stream in streams}) == 4


def test_the_noise_is_finite_where_the_uniform_draw_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeros:
        def __init__(self, key: tuple[int, int]) -> None: ...

        def random_raw(self, count: int) -> NDArray[np.uint64]:
            return np.zeros(count, np.uint64)

    monkeypatch.setattr(np.random, "Philox", Zeros)
    assert initial_latents([Noise(initial=0, path=0)], (3,)).isfinite().all()


@given(st.lists(st.one_of(st.integers(), st.text()), max_size=4))
def test_seeds_fit_a_signed_64_bit_integer(parts: list[int | str]) -> None:
    assert 0 <= derive_seed(*parts) < 2**63


def test_seeds_are_the_same_in_another_process() -> None:
    probe = "from rollout.noise import derive_seed; print(derive_seed('initial', 0, 1, 2, 3))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert int(done.stdout) == derive_seed("initial", 0, 1, 2, 3) == candidate_noises(0, 1, 2, 4)[3].initial
