"""Measure seconds, operations and memory of some work on any device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.process import peak_of

PEAK_SECONDS: Final = 0.5
"""Seconds of matrix products for the peak, which is that of the fastest one."""


def seconds(work: Callable[[], Any], device: str) -> float:
    """Measure the seconds of some work, until the device has finished it."""
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
    """Measure the seconds of every work, interleaved, so that load on the machine affects all alike."""
    for work in works.values():
        for _ in range(warmup):
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


def flops_of(work: Callable[[], Any], module: str = "Global") -> float:
    """Count the floating-point operations of matrix products, convolutions and attention, by torch's counter.

    ``module`` is the class of a model in the work; without it, all operations are counted. What is compiled
    runs uncompiled meanwhile, since counting would compile it once more.
    """
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        work()
    return float(sum(counter.get_flop_counts()[module].values()))


def matmul_peak(device: str, dtype: str) -> float:
    """Measure the FLOP/s of the fastest of many large matrix products, the peak of which shares are given."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    torch.mm(a, b)
    best, spent = float("inf"), 0.0
    while spent < PEAK_SECONDS:
        taken = seconds(lambda: torch.mm(a, b), device)
        best, spent = min(best, taken), spent + taken
    return 2 * size**3 / best


def peak_gb(work: Callable[[], Any], device: str) -> float:
    """Measure the peak memory of some work in GB, by the GPU's allocator, else of the process (Linux)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_of(work)[1] / 1e9
