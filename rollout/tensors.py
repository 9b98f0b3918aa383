"""Conversion of tensors to numpy arrays for the object store, bfloat16 included, and their memory."""

from __future__ import annotations

import ctypes
import warnings
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
KEPT: Final = 2**30
"""Bytes up to which `keep_freed_memory` keeps a freed block, and the heap's end."""


def pack(tensor: Tensor) -> NDArray[Any]:
    """Convert a tensor to a contiguous CPU array; bfloat16, which numpy lacks, becomes its int16 bits."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def unpack(array: NDArray[Any]) -> Tensor:
    """Invert `pack` with a copy, since arrays of the object store are read-only."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def borrow(array: NDArray[Any]) -> Tensor:
    """Invert `pack` without a copy; the result shares the array's memory and must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a GPU asynchronously, from pinned memory; on the CPU, return it as it is."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def allow_tf32(dtype: str) -> None:
    """Let a GPU's convolutions use TF32, of 10 bits, as torch does, unless ``dtype`` is "float32".

    The autoencoder gains by it, whose images have 8 bits; log-probs of a float32 model would lose.
    """
    torch.backends.cudnn.allow_tf32 = dtype != "float32"


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks; on CPUs it would otherwise map and zero large tensors anew each time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, KEPT)
