"""Summarise a profile: seconds by kind of kernel, copies, and gaps in which the device had nothing to do."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from cluster.bench.table import Measurement

KINDS: Final = (
    ("attention", r"flash|fmha|attention|sdpa"),
    ("convolutions", r"conv|implicit_gemm|wgrad|dgrad"),
    ("matrix products", r"gemm|nvjet|cutlass|\bmm\b|addmm|bmm|matmul|xmma"),
    ("copies to and from the host", r"memcpy (htod|dtoh|hto|dto)"),
    ("copies and concatenation", r"memcpy|memset|nchw|nhwc|copy|cat|contiguous|clone|transpose"),
    ("normalisation", r"norm"),
    ("compiled, elementwise and reductions", r"triton"),
    ("reductions", r"reduce|softmax|sum|mean"),
    ("elementwise", r"elementwise|add|mul|silu|gelu|sigmoid|fill|unrolled|vectorized|div|sub"),
)
"""Kinds of work, the first whose pattern a kernel's name matches."""


def profile_rows(name: str, work: Callable[[], Any], device: str) -> Iterator[Measurement]:
    """Profile some work, which has run before: milliseconds by kind, and those without any kernel."""
    gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as found:
        began = time.perf_counter()
        work()
        handed_over = time.perf_counter() - began
        if gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    kernels = list(_kernels(found.events() or (), gpu=gpu))
    by_kind: Counter[str] = Counter()
    for kernel, _, taken in kernels:
        by_kind[kind_of(kernel)] += taken  # type: ignore[assignment]
    for kind, taken in by_kind.most_common():
        yield Measurement(f"{name}, profiled: {kind} (ms)", [taken / 1e3], 2)
    if gpu:
        gaps = wall * 1e3 - busy(kernels) / 1e3
        yield Measurement(f"{name}, profiled: no kernel running (ms)", [gaps], 2)
        yield Measurement(f"{name}, profiled: kernels", [len(kernels)], 0)
    yield Measurement(f"{name}, profiled: until all was handed over (ms)", [handed_over * 1e3], 2)


def _kernels(events: Iterable[Any], *, gpu: bool) -> Iterator[tuple[str, float, float]]:
    """Yield name, start and microseconds of every kernel, or of every operation of a CPU."""
    for event in events:
        on_gpu = event.device_type == DeviceType.CUDA
        if on_gpu and gpu and not getattr(event, "is_user_annotation", False):
            yield event.name, event.time_range.start, event.time_range.elapsed_us()
        elif not gpu:
            yield event.name, event.time_range.start, event.self_cpu_time_total


def kind_of(kernel: str) -> str:
    """Classify a kernel by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel.lower())), "other")


def busy(kernels: Iterable[tuple[str, float, float]]) -> float:
    """Compute the microseconds in which at least one kernel was running."""
    total, until = 0.0, float("-inf")
    for _, start, taken in sorted(kernels, key=lambda one: one[1]):
        end = start + taken
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
