"""Tests of `rollout.weights`: weights arrive bit for bit, and wrong ones are refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rollout.records import WeightsMismatch
from rollout.weights import NamedParameters, buckets, checksum, flatten, load_flat, trainable


def parameters(seed: int = 0, **shapes: tuple[int, ...]) -> NamedParameters:
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {"first": (2, 3), "second": (4,)}
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def values(named: NamedParameters) -> list[torch.Tensor]:
    return [parameter for _, parameter in named]


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
