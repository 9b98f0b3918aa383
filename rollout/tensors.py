"""Tensors as numpy arrays for the object store, bfloat16 included, and weights as one flat array."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

NamedParameters = list[tuple[str, nn.Parameter]]


class WeightsMismatch(RuntimeError):
    """Received weights are not the ones that were sent, or not for this model."""


def pack(tensor: Tensor) -> NDArray[Any]:
    """A contiguous CPU array; bfloat16, which numpy lacks, travels as its int16 bits."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def unpack(array: NDArray[Any]) -> Tensor:
    """The inverse of `pack`; copies, since arrays of the object store are read-only."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def trainable(module: nn.Module) -> NamedParameters:
    """The parameters that are trained and travel, in manifest order."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def flatten(tensors: Iterable[Tensor]) -> NDArray[np.float32]:
    """One flat float32 array of all tensors, in order."""
    return torch.cat([t.detach().float().cpu().flatten() for t in tensors]).numpy()


def checksum(flat: NDArray[np.float32], parameters: NamedParameters) -> str:
    """A digest of the values and of the names and shapes they belong to."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in parameters:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    digest.update(np.ascontiguousarray(flat).data)
    return digest.hexdigest()


@torch.no_grad()
def load_flat(flat: NDArray[np.float32], parameters: NamedParameters, expected: str) -> None:
    """Copy a flat array into the parameters after checking it.

    Raises:
        WeightsMismatch: if the values, names or shapes are not those that ``expected`` was made of.
    """
    found = checksum(flat, parameters)
    if found != expected:
        raise WeightsMismatch(f"weights arrived with checksum {found}, expected {expected}")
    offset = 0
    source = torch.from_numpy(np.array(flat))
    for _, parameter in parameters:
        values = source[offset : offset + parameter.numel()]
        parameter.copy_(values.view_as(parameter))
        offset += parameter.numel()
