"""Trained parameters as flat arrays: their order, their division into buckets, checksums and loading."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rollout.records import WeightsMismatch
from rollout.tensors import borrow, pack

NamedParameters = list[tuple[str, nn.Parameter]]
BLOCK: Final = 4096


def trainable(module: nn.Module) -> NamedParameters:
    """Return the trained parameters, which are published, in manifest order."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def buckets(parameters: NamedParameters, limit: float) -> list[NamedParameters]:
    """Divide parameters, in order, into runs of at most ``limit`` bytes (a larger parameter stays whole)."""
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
    """Count the values of parameters; one partitioned by ZeRO-3 has its true size in ``ds_numel``."""
    return sum(getattr(p, "ds_numel", p.numel()) for _, p in parameters)


def flatten(tensors: Iterable[Tensor], *, into: Tensor | None = None) -> NDArray[Any]:
    """Copy all tensors into one flat array, in order and in their precision.

    ``into`` is memory to reuse: touching new memory takes several times as long as copying.
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
    """Digest the values together with the parameters' names, shapes and precision.

    A CRC-32 of the wrap-around sums of every 4 KiB: it detects damage, not an adversary, and runs at the
    memory's speed, four times as fast as the CRC of all bytes.
    """
    manifest = "".join(f"{name}{_shape(parameter)}{parameter.dtype}" for name, parameter in parameters)
    raw = np.ascontiguousarray(flat).view(np.uint8)
    whole = len(raw) - len(raw) % BLOCK
    sums = raw[:whole].view(np.uint64).reshape(-1, BLOCK // 8).sum(1, dtype=np.uint64)
    return f"{zlib.crc32(raw[whole:].data, zlib.crc32(sums.data, zlib.crc32(manifest.encode()))):08x}"


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def bucket_of(parameters: NamedParameters, numel: int) -> NamedParameters:
    """Return the first parameters that together have ``numel`` values.

    Raises:
        WeightsMismatch: if no number of whole parameters has that many values.
    """
    taken = list(accumulate(p.numel() for _, p in parameters))
    if numel not in taken:
        raise WeightsMismatch(f"{numel} values arrived, which no run of this model's parameters holds")
    return parameters[: taken.index(numel) + 1]


@torch.no_grad()
def load_flat(flat: NDArray[Any], parameters: NamedParameters, expected: str) -> None:
    """Verify a flat array and copy it into the parameters, without another copy of it.

    Raises:
        WeightsMismatch: if the values, names or shapes do not have the checksum ``expected``.
    """
    found = checksum(flat, parameters)
    if found != expected:
        raise WeightsMismatch(f"weights arrived with checksum {found}, expected {expected}")
    offset = 0
    for _, parameter in parameters:
        values = borrow(flat[offset : offset + parameter.numel()])
        parameter.copy_(values.view(parameter.shape))
        offset += parameter.numel()
