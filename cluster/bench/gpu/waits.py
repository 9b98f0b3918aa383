"""Count waits for the device within the loops of sampler and learner, which should need none.

On a GPU torch reports them itself. On a CPU, where nothing waits, the calls are counted that would wait on a
GPU, since they need a value.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from sys import _getframe
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

from cluster.bench.gpu.check import Setup
from cluster.bench.gpu.right import Sampled, plain_learner, tiny_subject
from cluster.bench.subject import requests, sampler_of
from cluster.bench.table import Measurement
from learner.worker import LearnerWorker
from rollout import worker as sampling
from rollout.tools.tiny_families import TINY

VALUES: Final = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
"""Methods of a tensor that need its values."""
REMAINING: Final = {"z_image": (4, 12), "qwen_image": (16, 12)}
"""Waits of sampler and learner that stay, in this check of two batches of four steps with guidance.

Z-Image's transformer takes prompts as a list, so their lengths are read for every batch and mini-batch; in
every pass of Qwen-Image's, diffusers copies a number to the device.
"""


def waits(setup: Setup) -> Iterator[Measurement]:
    """Sample and train with every family's tiny checkpoint."""
    for family in TINY:
        one = tiny_subject(setup, family, setup.device)
        sampler, learner = sampler_of(one), plain_learner(one)
        # First calls may wait, for libraries to be loaded.
        learner.update(Sampled.by(sampler, requests(one, 2)).work)
        with _watched(sampling, "denoise", setup.device) as found:
            work = Sampled.by(sampler, requests(one, 2)).work
        in_sampler, in_learner = REMAINING.get(family, (0, 0))
        yield _measured(f"{family}: waits of the sampler", found, in_sampler)
        with _watched(LearnerWorker, "_accumulate", setup.device) as found:
            learner.update(work)
        yield _measured(f"{family}: waits of the learner", found, in_learner)


def _measured(name: str, found: Counter[str], most: int) -> Measurement:
    places = ", ".join(place for place, _ in found.most_common(3))
    return Measurement(f"{name} ({places})" if places else name, [found.total()], 0, most=most)


@contextmanager
def _watched(owner: Any, name: str, device: str) -> Iterator[Counter[str]]:
    """Count the waits within all calls of a function, by the line that caused them."""
    found: Counter[str] = Counter()
    function = getattr(owner, name)
    watch = _reported if device == "cuda" else _counted

    @wraps(function)
    def watched(*arguments: Any, **options: Any) -> Any:
        with watch(found):
            return function(*arguments, **options)

    with patch.object(owner, name, watched):
        yield found


@contextmanager
def _reported(found: Counter[str]) -> Iterator[None]:
    """Count what torch warns of while the context lasts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one in caught:
        if "called a synchronizing" in str(one.message):
            found[f"{Path(one.filename).name}:{one.lineno}"] += 1


@contextmanager
def _counted(found: Counter[str]) -> Iterator[None]:
    """Count calls of methods that need values."""
    with ExitStack() as stack:
        for name in VALUES:
            method = getattr(Tensor, name)
            stack.enter_context(patch.object(Tensor, name, _counting(method, found)))
        yield


def _counting(method: Callable[..., Any], found: Counter[str]) -> Callable[..., Any]:
    @wraps(method)
    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        frame = _getframe(1)
        found[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1
        return method(tensor, *arguments, **options)

    return counted
