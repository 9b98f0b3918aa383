"""Tensors as arrays, bit for bit, and weights that cannot arrive wrong unnoticed."""

from __future__ import annotations

import platform
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rollout.records import WeightsMismatch
from rollout.tensors import (
    NamedParameters,
    buckets,
    checksum,
    flatten,
    load_flat,
    pack,
    trainable,
    unpack,
)


def parameters(seed: int = 0, **shapes: tuple[int, ...]) -> NamedParameters:
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {"first": (2, 3), "second": (4,)}
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def values(named: NamedParameters) -> list[torch.Tensor]:
    return [parameter for _, parameter in named]


def test_every_bfloat16_survives_the_trip() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    array = pack(bits.view(torch.bfloat16))
    assert array.dtype == np.int16
    found = unpack(array)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.view(torch.int16), bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_other_dtypes_travel_as_themselves(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype).T
    found = unpack(pack(tensor))
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


def test_a_packed_array_is_contiguous_and_an_unpacked_one_is_writable() -> None:
    array = pack(torch.zeros(3, 4, requires_grad=True).T)
    assert array.flags.c_contiguous
    array.flags.writeable = False
    unpack(array).add_(1)
    assert not array.any()


def test_only_trained_parameters_travel() -> None:
    module = nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    assert [name for name, _ in trainable(module)] == ["weight"]


@given(st.integers(0, 2**16), st.integers(0, 2999))
def test_the_checksum_catches_a_flipped_value(seed: int, position: int) -> None:
    named = parameters(seed, first=(50, 40), second=(1000,))
    flat = flatten(values(named))
    changed = flat.copy()
    changed[position] = np.nextafter(changed[position], np.float32(np.inf))
    assert checksum(changed, named) != checksum(flat, named)


@pytest.mark.parametrize(
    "shapes",
    [
        {"first": (3, 2), "second": (4,)},
        {"first": (2, 3), "other": (4,)},
        {"first": (6,), "second": (2, 2)},
        {"first": (2, 3), "second": (2,), "third": (2,)},
    ],
)
def test_the_checksum_catches_another_model(shapes: dict[str, tuple[int, ...]]) -> None:
    named = parameters()
    flat = flatten(values(named))
    assert checksum(flat, parameters(**shapes)) != checksum(flat, named)


def test_weights_arrive() -> None:
    sent, held = parameters(seed=0), parameters(seed=1)
    flat = flatten(values(sent))
    flat.flags.writeable = False
    load_flat(flat, held, checksum(flat, sent))
    for (_, before), (_, after) in zip(sent, held, strict=True):
        assert torch.equal(before, after)


def test_bfloat16_weights_travel_as_their_bits() -> None:
    sent, held = (
        [(name, nn.Parameter(p.to(torch.bfloat16))) for name, p in parameters(seed)] for seed in (0, 1)
    )
    flat = flatten(values(sent))
    assert flat.dtype == np.int16
    load_flat(flat, held, checksum(flat, sent))
    for (_, before), (_, after) in zip(sent, held, strict=True):
        assert torch.equal(before, after)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(4, 200))
def test_buckets_are_bounded_and_lose_nothing(sizes: list[int], limit: int) -> None:
    named = parameters(**{f"p{number}": (size,) for number, size in enumerate(sizes)})
    found = buckets(named, limit)
    assert [name for bucket in found for name, _ in bucket] == [name for name, _ in named]
    for bucket in found:
        assert len(bucket) == 1 or 4 * sum(p.numel() for _, p in bucket) <= limit
    for before, after in pairwise(found):  # none could have taken one more
        assert 4 * sum(p.numel() for _, p in [*before, after[0]]) > limit


@pytest.mark.parametrize("damage", ["value", "length", "names"])
def test_wrong_weights_are_refused_and_change_nothing(damage: str) -> None:
    sent = parameters(seed=0)
    held = parameters(seed=1, **({"first": (2, 3), "other": (4,)} if damage == "names" else {}))
    flat = flatten(values(sent))
    expected = checksum(flat, sent)
    if damage == "value":
        flat[3] += 1
    if damage == "length":
        flat = flat[:-1]
    before = flatten(values(held))
    with pytest.raises(WeightsMismatch, match=expected):
        load_flat(flat, held, expected)
    assert np.array_equal(before, flatten(values(held)))


FAULTS = """
import resource, torch
from rollout.tensors import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(12_000_000).fill_(1.0)  # 48 MB, more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
keep_freed_memory()
faults()
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 5
