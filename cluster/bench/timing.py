"""Seconds, operations and memory of some work: taking turns, on whatever device it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.process import peak_of

PEAK_SECONDS: Final = 0.5
"""How long matrices are multiplied for the peak; the best product counts."""


def seconds(work: Callable[[], Any], device: str) -> float:
    """How long some work takes, until the device has done it."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(
    works: Mapping[str, Callable[[], Any]], device: str, *, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every work, ``repeats`` times, one after the other in each: the machine's moods hit all."""
    for work in works.values():
        for _ in range(warmup):
            work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(seconds(work, device))
    return found


def flops_of(work: Callable[[], Any], module: str = "Global") -> float:
    """Floating-point operations of matrix products, convolutions and attention, as torch counts them.

    ``module`` is the class of a model that the work calls; without it, all that runs is counted.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return float(sum(counter.get_flop_counts()[module].values()))


def matmul_peak(device: str, dtype: str) -> float:
    """FLOP/s of the best of many large matrix products: what shares of the peak refer to."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    torch.mm(a, b)
    best, spent = float("inf"), 0.0
    while spent < PEAK_SECONDS:
        taken = seconds(lambda: torch.mm(a, b), device)
        best, spent = min(best, taken), spent + taken
    return 2 * size**3 / best


def peak_gb(work: Callable[[], Any], device: str) -> float:
    """The most memory held during some work, in GB: of the GPU's allocator, else of the process (Linux)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_of(work)[1] / 1e9
