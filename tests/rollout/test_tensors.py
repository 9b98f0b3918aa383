"""Tests of `rollout.tensors`: arrays equal their tensors bit for bit, and freed memory is reused."""

from __future__ import annotations

import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from rollout.tensors import pack, unpack


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
