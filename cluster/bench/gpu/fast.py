"""Checks of speed at real sizes, with random weights: sampler, learner, whole step, and their profiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from cluster.bench.gpu.check import Setup
from cluster.bench.gpu.kernels import profile_rows
from cluster.bench.gpu.right import Sampled
from cluster.bench.gpu.sizes import OTHER, SHAPES, guided_pass, subject_of, written
from cluster.bench.plain_loop import PlainLoop, supports
from cluster.bench.step import ServiceStep, turns
from cluster.bench.subject import Subject, learner_of, requests, sampler_of
from cluster.bench.table import Measurement
from cluster.bench.timing import flops_of, matmul_peak, peak_gb, seconds
from cluster.plan.speed import DECODING, FORWARD, IMAGES, LEARNER, MATRIX_PEAK, PIXELS, SHARE
from learner.objectives.flow_grpo import FlowGRPOSettings
from learner.rank_shares import RankUpdate
from learner.settings import LearnerSettings
from rollout.tools.random_models import NAMES

SHARES: Final = {"sampler": 50.0, LEARNER: 45.0}
"""Targets on a GPU: percent of the peak of matrix products."""
FASTER: Final = 2.0
"""Target on a GPU: the plain loop's time in that of our step."""


def built(setup: Setup) -> Iterator[Measurement]:
    """Write a random model, and measure the peak of the chip in the precisions that it may run in."""
    began = time.perf_counter()
    if setup.model in NAMES:
        written(setup)
        yield Measurement("model written (s)", [time.perf_counter() - began], 1)
    for dtype in ("bfloat16", "float16") if setup.gpus else ("float32",):
        peak = matmul_peak(setup.device, dtype) / 1e12
        yield Measurement(MATRIX_PEAK.format(dtype), [peak], 3)


def step(setup: Setup) -> Iterator[Measurement]:
    """Measure sampler, learner and whole step, on a GPU also compiled, and where the time goes.

    A step is a batch of images of one prompt, with guidance 4.5, all trained with KL in one optimizer step.
    """
    workers, shape = _Workers(subject_of(setup)), SHAPES.get(setup.model, OTHER)
    yield from workers.rows("not compiled", repeats=shape.turns)
    if setup.gpus:
        yield from workers.compiled()
        yield from workers.rows("compiled", repeats=2, aims=SHARES)
        yield from workers.ratios()
    yield from workers.profiles()
    yield from workers.steps(shape.turns)


class _Workers:
    """A sampler and a learner of a model in one process, first without compilation."""

    def __init__(self, one: Subject) -> None:
        self.one, self.batch, self.asked = one, one.rollout.batch, requests(one, 1)
        self.peak = matmul_peak(one.device, one.model.dtype)
        self.sampler = sampler_of(one)
        first: list[Sampled] = []
        sample = partial(Sampled.by, self.sampler, self.asked)
        self.memory = {"sampler": peak_gb(lambda: first.append(sample()), one.device)}
        self.work = first[0].work
        held = _held(one)
        self.learner = learner_of(one, _settings(one))
        self.memory["learner"] = peak_gb(self.update, one.device) - held
        # Two passes of the learner at most: enough to count their operations, and for a profile.
        few = max(1, self.batch // one.rollout.trained_steps)
        self.small = replace(self.work, shares=[self.work.shares[0][:few]])

    def update(self) -> None:
        """Train all images."""
        self.learner.update(self.work)

    def rows(self, how: str, repeats: int, aims: Mapping[str, float] = {}) -> Iterator[Measurement]:
        """Measure the sampler, its parts, and the learner, after their first calls."""
        one, policy, pairs = self.one, self.sampler.policy, _pairs(self.one, self.work)
        latents = torch.randn(self.batch, *policy.latent_shape(), device=one.device)
        velocity = guided_pass(one, policy)
        works: dict[str, Callable[[], Any]] = {
            f"{how}: {self.batch} images (s)": lambda: self.sampler.sample(self.asked),
            f"{how}: {DECODING}": lambda: policy.decode(latents),
            f"{how}: a forward pass with guidance (s)": velocity,
            f"{how}: update of {pairs} pairs (s)": self.update,
        }
        times = {name: self._times(work, repeats) for name, work in works.items()}
        yield from (Measurement(name, found, 4) for name, found in times.items())
        settings = one.rollout
        yield Measurement(f"{how}: {IMAGES}", [self.batch], 0)
        yield Measurement(f"{how}: {PIXELS}", [settings.width * settings.height * settings.frames], 0)
        sampling, _, passes, learning = times.values()
        forward = flops_of(velocity, type(policy.transformer).__name__)
        trained = flops_of(lambda: self.learner.update(self.small)) * pairs / _pairs(one, self.small)
        yield Measurement(f"{how}: images per second", [self.batch / taken for taken in sampling])
        yield Measurement(f"{how}: pairs per second", [pairs / taken for taken in learning])
        for name, flops, found in (
            ("sampler", forward * one.rollout.steps, sampling),
            (FORWARD, forward, passes),
            (LEARNER, trained, learning),
        ):
            shares = [100 * flops / taken / self.peak for taken in found]
            yield Measurement(f"{how}: {name}, {SHARE}", shares, 1, least=aims.get(name))
        for name, memory in self.memory.items():
            yield Measurement(f"{how}: {name}, peak memory (GB)", [memory], 2)

    def compiled(self) -> Iterator[Measurement]:
        """Compile sampler and learner where they are, and compare their first results with those before."""
        before = Sampled.by(self.sampler, self.asked)
        self.sampler.policy.compile()
        after: list[Sampled] = []
        first = seconds(lambda: after.append(Sampled.by(self.sampler, self.asked)), self.one.device)
        yield Measurement("compiled: the sampler's first batch (s)", [first], 1)
        apart = np.abs(after[0].log_probs - before.log_probs).mean(0).tolist()
        yield Measurement("compiled: log-probs apart from those before, mean by step", apart, 6, most=0.01)
        self.learner.policy.compile()
        first = seconds(self.update, self.one.device)
        yield Measurement("compiled: the learner's first update (s)", [first], 1)
        self.memory = {
            "sampler and learner": peak_gb(lambda: self.sampler.sample(self.asked), self.one.device),
            "learner and sampler": peak_gb(self.update, self.one.device),
        }

    def ratios(self) -> Iterator[Measurement]:
        """Train the same candidates in two optimizer steps, the second with old log-probs of the learner."""
        twice = replace(self.work, shares=[*self.work.shares, *self.work.shares])
        clipped = self.learner.update(twice).metrics["clip_fraction"]
        name = "compiled: ratios of an unchanged policy beyond the clip range"
        yield Measurement(name, [clipped], 4, most=0)

    def profiles(self) -> Iterator[Measurement]:
        """Profile a forward pass and a small update."""
        work = guided_pass(self.one, self.sampler.policy)
        yield from profile_rows("a forward pass with guidance", work, self.one.device)
        name = f"update of {_pairs(self.one, self.small)} pairs"
        yield from profile_rows(name, partial(self.learner.update, self.small), self.one.device)

    def steps(self, count: int) -> Iterator[Measurement]:
        """Measure whole steps, weights handed over, in turns with the plain loop if it supports the model."""
        one, ours = self.one, ServiceStep(self.one, self.sampler, self.learner, groups=1)
        if not supports(self.sampler.policy):
            times = [seconds(partial(ours.step, number), one.device) for number in range(count)]
            yield Measurement("step (s)", times, 3)
            return
        plain = PlainLoop(one, self.learner.settings, batch=min(8, self.batch))
        found, aim = turns(one, ours, plain, groups=1, steps=count), FASTER if one.device == "cuda" else None
        yield Measurement("step (s)", found.ours.seconds, 3)
        yield Measurement("plain loop (s)", found.plain.seconds, 3)
        yield Measurement("plain loop / step", found.ratios, 2, least=aim)
        yield Measurement("losses apart", found.apart, 7, most=1e-2)

    def _times(self, work: Callable[[], Any], repeats: int) -> list[float]:
        work()
        return [seconds(work, self.one.device) for _ in range(repeats)]


def _settings(one: Subject) -> LearnerSettings:
    """Return a learner with KL and passes as large as the sampler's.

    Its steps are too small to change a weight, so that ratios stay 1 and every step is the same work. Once
    compiled, learners of half precision need old log-probs of their own.
    """
    return LearnerSettings(
        gpus=one.rollout.gpus, threads=one.rollout.threads, zero_stage=0, updates=1, learning_rate=1e-30,
        micro_batch=one.rollout.batch, objective=FlowGRPOSettings(beta=0.04, old_log_probs="learner"),
    )  # fmt: skip


def _pairs(one: Subject, work: RankUpdate) -> int:
    """Count the pairs of trajectory and step that an update trains."""
    return sum(map(len, work.shares)) * one.rollout.trained_steps


def _held(one: Subject) -> float:
    """Return the GB that are allocated on the GPU."""
    return torch.cuda.memory_allocated() / 1e9 if one.device == "cuda" else 0.0
