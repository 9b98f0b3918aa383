"""Checks of speed at real sizes, with random weights: sampler, learner, whole step, and their profiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from cluster.bench.gpu.check import Setup
from cluster.bench.gpu.kernels import profile_rows
from cluster.bench.gpu.right import Sampled
from cluster.bench.plain_loop import PlainLoop
from cluster.bench.step import ServiceStep, turn
from cluster.bench.subject import Subject, learner_of, not_compiled, requests, sampled_work, sampler_of
from cluster.bench.table import Measurement
from cluster.bench.timing import flops_of, matmul_peak, peak_gb, seconds
from learner.objectives.flow_grpo import FlowGRPOSettings
from learner.rank_shares import RankUpdate
from learner.settings import LearnerSettings
from learner.worker import LearnerWorker
from rollout.families.registry import family_of
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.random_models import save_random
from rollout.worker import RolloutWorker

DTYPE: Final = {"cuda": "bfloat16", "cpu": "float32"}
REPEATS: Final = 3
SHARES: Final = {"sampler": 50.0, "learner": 45.0}
"""Targets on a GPU: percent of the peak of matrix products."""
FASTER: Final = 2.0
"""Target on a GPU: the plain loop's time in that of our step."""
SD3: Final = "rollout.families.sd3:SD3"
"""The family that the plain loop supports."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes at which a model is measured, as settings of the sampler."""

    rollout: dict[str, Any]
    lora_rank: int = 32
    turns: int = 1
    """Whole steps in turns with the plain loop, which takes long."""


SHAPES: Final = {
    "tiny": Shape({"width": 32, "height": 32, "steps": 3, "batch": 4, "text_tokens": 0}, turns=2),
    "sd35-medium": Shape({"batch": 16}),
    "sd35-large": Shape({"batch": 8}),
}
OWN: Final = Shape({"batch": 8})
"""The sizes for a pipeline of the user's own."""


def built(setup: Setup) -> Iterator[Measurement]:
    """Write a random model, and measure the peak of the chip in the precisions that it may run in."""
    began = time.perf_counter()
    if setup.model in SHAPES:
        save_random(setup.model, _folder(setup), DTYPE[setup.device])
        yield Measurement("model written (s)", [time.perf_counter() - began], 1)
    for dtype in ("bfloat16", "float16") if setup.gpus else ("float32",):
        peak = matmul_peak(setup.device, dtype) / 1e12
        yield Measurement(f"peak of matrix products in {dtype} (TFLOP/s)", [peak], 3)


def step(setup: Setup) -> Iterator[Measurement]:
    """Measure sampler, learner and whole step, compiled on a GPU, and where the time goes.

    A step is a batch of images of one prompt, with guidance 4.5, all trained with KL in one optimizer step.
    """
    one, shape = _subject(setup)
    peak, asked, began = matmul_peak(one.device, one.model.dtype), requests(one, 1), time.perf_counter()
    sampler = sampler_of(one)
    yield Measurement("sampler: loaded and compiled (s)", [time.perf_counter() - began], 1)
    yield from _sampler_rows(one, sampler, peak)
    yield from _not_compiled_rows(one, sampler)
    work, held, began = sampled_work(sampler, asked, updates=1), _held(one), time.perf_counter()
    learner = learner_of(one, _settings(one))
    learner.update(work)
    yield Measurement("learner: loaded, compiled and first update (s)", [time.perf_counter() - began], 1)
    yield from _learner_rows(one, learner, work, peak, held)
    yield from profile_rows("sampler, one pass with guidance", _pass(one, sampler), one.device)
    small = replace(work, shares=[work.shares[0][:2]])
    yield from profile_rows(f"learner, {_pairs(one, small)} pairs", lambda: learner.update(small), one.device)
    yield from _step_rows(one, ServiceStep(one, sampler, learner, groups=1), shape.turns)


def _subject(setup: Setup) -> tuple[Subject, Shape]:
    shape, gpu = SHAPES.get(setup.model, OWN), bool(setup.gpus)
    path = str(_folder(setup)) if setup.model in SHAPES else setup.model
    model = ModelSettings(path=path, dtype=DTYPE[setup.device], lora_rank=shape.lora_rank, compile=gpu)
    rollout = RolloutSettings.model_validate(
        {"storage": "bfloat16", "gpus": setup.gpus, "threads": torch.get_num_threads(), **shape.rollout}
    )
    return Subject(model, rollout, setup.device), shape


def _settings(one: Subject) -> LearnerSettings:
    """Return a learner with KL and passes as large as the sampler's.

    Its steps are too small to change a weight, so that ratios stay 1 and every step is the same work. Once
    compiled, learners of half precision need old log-probs of their own.
    """
    return LearnerSettings(
        gpus=one.rollout.gpus, threads=one.rollout.threads, zero_stage=0, updates=1, learning_rate=1e-30,
        micro_batch=one.rollout.batch, objective=FlowGRPOSettings(beta=0.04, old_log_probs="learner"),
    )  # fmt: skip


def _sampler_rows(one: Subject, sampler: RolloutWorker, peak: float) -> Iterator[Measurement]:
    asked, batch, policy = requests(one, 1), one.rollout.batch, sampler.policy
    sampler.sample(asked)
    memory = peak_gb(lambda: sampler.sample(asked), one.device)
    times = [seconds(lambda: sampler.sample(asked), one.device) for _ in range(REPEATS)]
    flops = one.rollout.steps * flops_of(_pass(one, sampler), type(policy.transformer).__name__)
    latents = torch.randn(batch, *policy.latent_shape(), device=one.device)
    policy.decode(latents)
    decoding = [seconds(lambda: policy.decode(latents), one.device) for _ in range(REPEATS)]
    passes = [seconds(_pass(one, sampler), one.device) for _ in range(REPEATS)]
    yield Measurement(f"sampler: {batch} images (s)", times, 3)
    yield Measurement("sampler: images per second", [batch / taken for taken in times])
    yield Measurement("sampler: decoding them (s)", decoding, 3)
    yield Measurement("sampler: one pass with guidance (s)", passes, 4)
    yield Measurement("sampler: transformer GFLOPs per image", [flops / batch / 1e9])
    yield _share("sampler", flops, times, peak, one)
    yield _share("sampler, without decoding and noise", flops / one.rollout.steps, passes, peak, one)
    yield Measurement("sampler: peak memory (GB)", [memory], 2)


def _not_compiled_rows(one: Subject, sampler: RolloutWorker) -> Iterator[Measurement]:
    """Sample the same images once more without the compiled blocks."""
    if not one.model.compile:
        return
    asked = requests(one, 1)
    ours = Sampled.by(sampler, asked)
    theirs: list[Sampled] = []
    with torch.compiler.set_stance("force_eager"):
        taken = seconds(lambda: theirs.append(Sampled.by(sampler, asked)), one.device)
    yield Measurement("sampler, not compiled: the same images (s)", [taken], 3)
    apart = np.abs(ours.log_probs - theirs[0].log_probs).mean(0)
    yield Measurement("sampler, compiled or not: log-probs apart, mean by step", apart.tolist(), 6, most=0.01)


def _learner_rows(
    one: Subject, learner: LearnerWorker, work: RankUpdate, peak: float, held: float
) -> Iterator[Measurement]:
    memory = peak_gb(lambda: learner.update(work), one.device) - held
    times = [seconds(lambda: learner.update(work), one.device) for _ in range(REPEATS)]
    small = replace(work, shares=[work.shares[0][: max(1, one.rollout.batch // one.rollout.trained_steps)]])
    pairs = _pairs(one, work)
    flops = pairs / _pairs(one, small) * flops_of(lambda: learner.update(small))
    yield Measurement(f"learner: update of {pairs} pairs (s)", times, 3)
    yield Measurement("learner: pairs per second", [pairs / taken for taken in times], 1)
    yield Measurement("learner: transformer GFLOPs per pair", [flops / pairs / 1e9])
    yield _share("learner", flops, times, peak, one)
    if one.device == "cuda":
        yield Measurement("learner: peak memory (GB)", [memory], 2)
    twice = replace(work, shares=[*work.shares, *work.shares])
    clipped = learner.update(twice).metrics["clip_fraction"]
    yield Measurement("learner: ratios of an unchanged policy beyond the clip range", [clipped], 4, most=0)


def _step_rows(one: Subject, ours: ServiceStep, turns: int) -> Iterator[Measurement]:
    """Measure whole steps, in turns with the plain loop where it supports the model."""
    if family_of(one.model.path) != SD3:
        times = [seconds(partial(ours.step, number), one.device) for number in range(turns)]
        yield Measurement("step (s)", times, 3)
        return
    plain = PlainLoop(not_compiled(one), ours.learner.settings, batch=min(8, one.rollout.batch))
    both = [turn(one, ours, plain, groups=1, step=number) for number in range(turns)]
    yield Measurement("step (s)", [found.ours for found in both], 3)
    yield Measurement("plain loop (s)", [found.plain for found in both], 3)
    ratios, aim = [found.plain / found.ours for found in both], FASTER if one.device == "cuda" else None
    yield Measurement("plain loop / step", ratios, 2, least=aim)
    yield Measurement("losses apart", [found.difference for found in both], 7, most=1e-2)


def _share(name: str, flops: float, times: Sequence[float], peak: float, one: Subject) -> Measurement:
    aim = SHARES.get(name) if one.device == "cuda" else None
    return Measurement(
        f"{name}: share of the peak (%)", [100 * flops / taken / peak for taken in times], 1, least=aim
    )


def _pass(one: Subject, sampler: RolloutWorker) -> Callable[[], Any]:
    """Build a forward pass of both branches of the guidance for a batch."""
    policy, batch = sampler.policy, one.rollout.batch
    encoded = policy.encode(requests(one, 1)[0].prompt.text)
    conditioning = {name: torch.stack([value] * batch) for name, value in encoded.items()}
    x = torch.randn(batch, *policy.latent_shape(), device=one.device)
    timestep = torch.full((batch,), 500.0, device=one.device)
    return torch.no_grad()(lambda: policy.velocity(policy.transformer, x, timestep, conditioning))


def _pairs(one: Subject, work: RankUpdate) -> int:
    """Count the pairs of trajectory and step that an update trains."""
    return sum(map(len, work.shares)) * one.rollout.trained_steps


def _held(one: Subject) -> float:
    """Return the GB that are allocated on the GPU."""
    return torch.cuda.memory_allocated() / 1e9 if one.device == "cuda" else 0.0


def _folder(setup: Setup) -> Path:
    return setup.folder / setup.model
