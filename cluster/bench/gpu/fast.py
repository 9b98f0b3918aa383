"""Checks of speed at real sizes, with random weights: sampler, learner, whole step, and their profiles."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from cluster.bench import learner, sampler, step
from cluster.bench.gpu.check import Setup, SkippedError
from cluster.bench.gpu.kernels import profile_rows
from cluster.bench.subject import Subject, learner_of, requests, sampled_work, sampler_of, subject
from cluster.bench.table import Measurement
from cluster.bench.timing import matmul_peak
from learner.objectives.flow_grpo import FlowGRPOSettings
from learner.settings import LearnerSettings
from rollout.tools.random_models import save_random

DTYPE: Final = {"cuda": "bfloat16", "cpu": "float32"}
LEAST: Final = {"share of the peak, ours (%)": 50.0, "share of the peak (%)": 45.0, "plain loop / ours": 2.0}
"""Targets on a GPU, by the names of measurements."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes at which a model is measured, as options of the benchmarks, and the batch of a profile."""

    sizes: str
    batch: int
    repeats: int = 2


SHAPES: Final = {
    "tiny": Shape("--size 32 --steps 3", batch=4),
    "sd35-medium": Shape("--size 512 --steps 10", batch=16),
    "sd35-large": Shape("--size 512 --steps 10", batch=8),
}
OWN: Final = Shape("--size 512 --steps 10", batch=8)
"""The sizes for a pipeline of the user's own."""


def built(setup: Setup) -> Iterator[Measurement]:
    """Write a random model, and measure the peak of the chip in the precisions that it may run in."""
    began = time.perf_counter()
    if not _is_own(setup):
        save_random(setup.model, _folder(setup), DTYPE[setup.device])
        yield Measurement("model written (s)", [time.perf_counter() - began], 1)
    for dtype in ("bfloat16", "float16") if setup.device == "cuda" else ("float32",):
        peak = matmul_peak(setup.device, dtype) / 1e12
        yield Measurement(f"peak of matrix products in {dtype} (TFLOP/s)", [peak], 3)


def sampling(setup: Setup) -> Iterator[Measurement]:
    """Measure the sampler with compiled blocks, against the diffusers pipeline."""
    yield from _rows(sampler, setup, "--groups", "4", *_compiled(setup))


def learning(setup: Setup) -> Iterator[Measurement]:
    """Measure updates with compiled blocks, passes as large as the sampler's, and KL."""
    batch = str(_shape(setup).batch)
    yield from _rows(learner, setup, "--groups", "1", "--micro-batch", batch, *_compiled(setup))


def stepping(setup: Setup) -> Iterator[Measurement]:
    """Measure a whole step with compiled blocks against the plain loop."""
    batch = str(_shape(setup).batch)
    yield from _rows(step, setup, "--groups", "1", "--micro-batch", batch, *_compiled(setup))


def sampling_eager(setup: Setup) -> Iterator[Measurement]:
    """Measure the sampler without compilation."""
    _needs_gpu(setup)
    yield from _rows(sampler, setup, "--groups", "4", targets=False)


def learning_eager(setup: Setup) -> Iterator[Measurement]:
    """Measure updates without compilation."""
    _needs_gpu(setup)
    batch = str(_shape(setup).batch)
    yield from _rows(learner, setup, "--groups", "1", "--micro-batch", batch, targets=False)


def profiles(setup: Setup) -> Iterator[Measurement]:
    """Profile three steps of a sampler's batch, with its decoding, and a part of an update, compiled."""
    with subject(_options(sampler, setup, *_compiled(setup))) as one:
        brief = replace(one, rollout=one.rollout.model_copy(update={"steps": 3}))
        yield from _profiled_sampler(brief)
        torch.cuda.empty_cache()
        yield from _profiled_learner(brief)


def _profiled_sampler(one: Subject) -> Iterator[Measurement]:
    worker, asked = sampler_of(one), requests(one, 1)
    worker.sample(asked)
    yield from profile_rows("sampler, 3 steps", lambda: worker.sample(asked), one.device)


def _profiled_learner(one: Subject) -> Iterator[Measurement]:
    settings = LearnerSettings(
        gpus=one.rollout.gpus, threads=one.rollout.threads, zero_stage=0, micro_batch=one.rollout.batch,
        updates=1, objective=FlowGRPOSettings(beta=0.04),
    )  # fmt: skip
    plain = replace(one, model=one.model.model_copy(update={"compile": False}))
    work = sampled_work(sampler_of(plain), requests(one, 1), updates=1)
    trained = learner_of(one, settings)
    trained.update(work)
    pairs = one.rollout.batch * one.rollout.trained_steps
    yield from profile_rows(f"learner, {pairs} pairs", lambda: trained.update(work), one.device)


def _rows(module: ModuleType, setup: Setup, *more: str, targets: bool = True) -> Iterator[Measurement]:
    """Run a benchmark, and add the targets to its measurements."""
    aims = LEAST if targets and setup.device == "cuda" else {}
    for row in module.measure(_options(module, setup, *more), []).rows:
        yield replace(row, least=aims.get(row.name))


def _options(module: Any, setup: Setup, *more: str) -> argparse.Namespace:
    parser, shape = argparse.ArgumentParser(), _shape(setup)
    module.options(parser)
    path = setup.model if _is_own(setup) else str(_folder(setup))
    fixed = ["--model", path, "--dtype", DTYPE[setup.device], "--batch", str(shape.batch)]
    device = ["--cpu"] if setup.device == "cpu" else []
    return parser.parse_args([*fixed, *shape.sizes.split(), "--repeats", str(shape.repeats), *device, *more])


def _compiled(setup: Setup) -> list[str]:
    return ["--compile"] if setup.device == "cuda" else []


def _shape(setup: Setup) -> Shape:
    return SHAPES.get(setup.model, OWN)


def _needs_gpu(setup: Setup) -> None:
    if not setup.gpus:
        raise SkippedError("nothing is compiled on a CPU")


def _is_own(setup: Setup) -> bool:
    return setup.model not in SHAPES


def _folder(setup: Setup) -> Path:
    return setup.folder / setup.model
