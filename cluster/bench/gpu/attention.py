"""A check of which kernel of attention is fastest for a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cluster.bench.gpu.check import Setup, SkippedError
from cluster.bench.gpu.sizes import guided_pass, subject_of
from cluster.bench.subject import sampler_of
from cluster.bench.table import Measurement
from cluster.bench.timing import seconds
from rollout.families.transformer import switch_attention

ATTENTION: Final = ("native", "_native_flash", "_native_cudnn", "_native_efficient")
"""Names of torch's kernels in diffusers; with "native", torch chooses."""


def attention(setup: Setup) -> Iterator[Measurement]:
    """Time a forward pass with each of torch's kernels of attention, to choose ``model.attention`` by.

    Raises:
        SkippedError: if the model has no choice; torch then chooses by itself.
    """
    one = subject_of(setup)
    policy = sampler_of(one).policy
    work = guided_pass(one, policy)
    work()  # what fails without a choice is no lack of a kernel
    for backend in ATTENTION:
        try:
            switch_attention(policy.transformer, backend)
        except ValueError as error:
            raise SkippedError(str(error)) from None
        try:
            work()
        except (RuntimeError, ValueError):  # not for this precision, mask or size of heads
            continue
        taken = [seconds(work, one.device) for _ in range(3)]
        yield Measurement(f"a forward pass with model.attention = {backend!r} (s)", taken, 4)
