"""Tensors as numpy arrays for the object store, bfloat16 included, and weights as one flat array."""

from __future__ import annotations

import ctypes
import warnings
import zlib
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rollout.records import WeightsMismatch

NamedParameters = list[tuple[str, nn.Parameter]]
BLOCK: Final = 4096
M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
KEPT: Final = 2**30
"""Bytes up to which `keep_freed_memory` keeps a freed block, and the heap's end."""


def pack(tensor: Tensor) -> NDArray[Any]:
    """A contiguous CPU array; bfloat16, which numpy lacks, travels as its int16 bits."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: on CPUs, large tensors would else be mapped and zeroed anew each time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, KEPT)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it, from pinned memory; a CPU's tensor is there already."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def unpack(array: NDArray[Any]) -> Tensor:
    """The inverse of `pack`; copies, since arrays of the object store are read-only."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def borrow(array: NDArray[Any]) -> Tensor:
    """Like `unpack`, but of the same memory: to read from and then to forget."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def trainable(module: nn.Module) -> NamedParameters:
    """The parameters that are trained and travel, in manifest order."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def buckets(parameters: NamedParameters, limit: float) -> list[NamedParameters]:
    """Runs of parameters, in order, of at most ``limit`` bytes each (one larger parameter stays whole)."""
    found: list[NamedParameters] = [[]]
    size = 0
    for one in parameters:
        more = numel_of([one]) * one[1].element_size()
        if found[-1] and size + more > limit:
            found.append([])
            size = 0
        found[-1].append(one)
        size += more
    return found


def numel_of(parameters: NamedParameters) -> int:
    """How many values parameters have; one that ZeRO-3 has partitioned carries its true size beside it."""
    return sum(getattr(p, "ds_numel", p.numel()) for _, p in parameters)


def flatten(tensors: Iterable[Tensor], *, into: Tensor | None = None) -> NDArray[Any]:
    """One flat array of all tensors, in order and in their precision.

    ``into`` is memory to use again: touching new memory takes several times as long as copying.
    """
    flat = [t.detach().flatten() for t in tensors]
    numel = sum(map(len, flat))
    if into is None:
        into = torch.empty(numel, dtype=flat[0].dtype)
    offset = 0
    for values in flat:
        into[offset : offset + len(values)].copy_(values)
        offset += len(values)
    return pack(into[:numel])


def checksum(flat: NDArray[Any], parameters: NamedParameters) -> str:
    """A digest of the values and of the names, shapes and precision they belong to.

    A CRC-32 of the wrap-around sums of every 4 KiB: it guards against damage, not against an adversary, and
    runs at the memory's speed, four times as fast as the CRC of all bytes.
    """
    manifest = "".join(f"{name}{_shape(parameter)}{parameter.dtype}" for name, parameter in parameters)
    raw = np.ascontiguousarray(flat).view(np.uint8)
    whole = len(raw) - len(raw) % BLOCK
    sums = raw[:whole].view(np.uint64).reshape(-1, BLOCK // 8).sum(1, dtype=np.uint64)
    return f"{zlib.crc32(raw[whole:].data, zlib.crc32(sums.data, zlib.crc32(manifest.encode()))):08x}"


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def bucket_of(parameters: NamedParameters, numel: int) -> NamedParameters:
    """The first parameters, as many as ``numel`` values fill.

    Raises:
        WeightsMismatch: if no number of whole parameters has that many values.
    """
    taken = list(accumulate(p.numel() for _, p in parameters))
    if numel not in taken:
        raise WeightsMismatch(f"{numel} values arrived, which no run of this model's parameters holds")
    return parameters[: taken.index(numel) + 1]


@torch.no_grad()
def load_flat(flat: NDArray[Any], parameters: NamedParameters, expected: str) -> None:
    """Copy a flat array into the parameters after checking it, without a second copy of it.

    Raises:
        WeightsMismatch: if the values, names or shapes are not those that ``expected`` was made of.
    """
    found = checksum(flat, parameters)
    if found != expected:
        raise WeightsMismatch(f"weights arrived with checksum {found}, expected {expected}")
    offset = 0
    for _, parameter in parameters:
        values = borrow(flat[offset : offset + parameter.numel()])
        parameter.copy_(values.view(parameter.shape))
        offset += parameter.numel()
