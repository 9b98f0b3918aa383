"""Compare a training step of our sampler and learner with a straightforward loop of the same maths.

Both sample the same images from the same seeds and train the same trajectories with KL, in turns. The plain
loop starts every step from our weights, so the losses must agree. It is never compiled, as published. The
rows of the transformer's passes are counted: where few rows keep a machine busy, they are what a step costs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cluster.bench.plain_loop import PlainLoop, start_from
from cluster.bench.subject import (
    Subject,
    add_options,
    learner_of,
    not_compiled,
    requests,
    sampled_work,
    sampler_of,
    subject,
)
from cluster.bench.table import BenchmarkReport, Measurement, refuse_arguments
from cluster.bench.timing import seconds
from cluster.config.errors import UserError
from learner.objectives.flow_grpo import FlowGRPOSettings
from learner.rank_shares import RankUpdate
from learner.settings import LearnerSettings
from learner.worker import LearnerWorker
from rollout.records import WeightsId
from rollout.worker import RolloutWorker


def options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    add_options(parser)
    parser.add_argument(
        "--naive-batch", type=int, default=8, help="images per forward pass of the plain loop"
    )
    parser.add_argument("--micro-batch", type=int, help="default: the learner's own choice")
    parser.add_argument("--warmup", type=int, default=1)


class ServiceStep:
    """A step of the service's sampler and learner in one process, weight transfer included."""

    def __init__(self, one: Subject, sampler: RolloutWorker, learner: LearnerWorker, groups: int) -> None:
        self.one, self.sampler, self.learner, self.groups = one, sampler, learner, groups
        self.work = RankUpdate(shares=[], conditionings={}, trajectories={})

    def step(self, step: int) -> float:
        """Make a step, keep the work of its update, and return its loss."""
        asked = requests(self.one, self.groups, step)
        self.work = sampled_work(self.sampler, asked, self.learner.settings.updates)
        loss = self.learner.update(self.work).metrics["loss"]
        for number, (digest, flat) in enumerate(self.learner.publish()):
            assert flat is not None
            self.sampler.load(WeightsId(0), number, self.learner.parts(), digest, flat)
        return loss


def measure(options: argparse.Namespace, rest: Sequence[str]) -> BenchmarkReport:
    """Run both, in turns.

    Raises:
        UserError: if no adapter is trained, or the plain loop does not support the model.
    """
    refuse_arguments(rest)
    if not options.lora_rank:
        raise UserError(
            "--lora-rank: got 0, expected an adapter, without which the reference is a second model"
        )
    with subject(options) as one:
        settings = LearnerSettings(
            gpus=one.rollout.gpus, threads=options.threads, zero_stage=0,
            objective=FlowGRPOSettings(beta=0.04),
            micro_batch=options.micro_batch,
        )  # fmt: skip
        ours = ServiceStep(one, sampler_of(one), learner_of(one, settings), options.groups)
        return _report(options, one, ours, PlainLoop(not_compiled(one), settings, options.naive_batch))


@dataclass(slots=True)
class Passes:
    """Rows that transformers were called with, without gradients and with them."""

    without: int = 0
    with_gradients: int = 0

    def watch(self, transformer: nn.Module) -> None:
        """Count every call from now on."""
        transformer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, positional: Any, named: dict[str, Any]) -> None:
        rows = len(named["hidden_states"])
        if torch.is_grad_enabled():
            self.with_gradients += rows
        else:
            self.without += rows


@dataclass(slots=True)
class Side:
    """The wall-clock and processor seconds of every step of one side, its passes and its losses."""

    device: str
    seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    passes: Passes = field(default_factory=Passes)

    def run(self, step: Callable[..., float], *arguments: Any) -> None:
        """Make and measure a step, which returns its loss."""
        busy = time.process_time()
        self.seconds.append(seconds(lambda: self.losses.append(step(*arguments)), self.device))
        self.busy.append(time.process_time() - busy)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The steps of our sampler and learner, and the same ones of the plain loop."""

    ours: Side
    plain: Side

    @property
    def ratios(self) -> list[float]:
        """The plain loop's seconds in ours, by step."""
        return _ratios(self.plain.seconds, self.ours.seconds)

    @property
    def busy_ratios(self) -> list[float]:
        """The same in seconds of the processor."""
        return _ratios(self.plain.busy, self.ours.busy)

    @property
    def apart(self) -> list[float]:
        """The differences of the losses, by step."""
        return [abs(a - b) for a, b in zip(self.ours.losses, self.plain.losses, strict=True)]


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def turns(one: Subject, ours: ServiceStep, plain: PlainLoop, groups: int, steps: int) -> Comparison:
    """Let both make each step in turn, from the same weights."""
    found = Comparison(Side(one.device), Side(one.device))
    for transformer in (ours.sampler.policy.transformer, ours.learner.policy.transformer):
        found.ours.passes.watch(transformer)
    found.plain.passes.watch(plain.transformer)
    for step in range(steps):
        start_from(plain, [p for _, p in ours.learner.parameters])
        asked = requests(one, groups, step)
        found.ours.run(ours.step, step)
        found.plain.run(plain.step, asked, ours.work.shares)
    return found


def _report(
    options: argparse.Namespace, one: Subject, ours: ServiceStep, plain: PlainLoop
) -> BenchmarkReport:
    steps, timed = options.warmup + options.repeats, slice(options.warmup, None)
    found, images = turns(one, ours, plain, options.groups, steps), options.groups * options.batch
    mine, theirs = found.ours, found.plain

    def passes(title: str, side: Side) -> list[Measurement]:
        counted = {"without gradients": side.passes.without, "with gradients": side.passes.with_gradients}
        return [
            Measurement(f"rows per image {what}, {title}", [rows / steps / images], 1)
            for what, rows in counted.items()
        ]

    return BenchmarkReport(
        f"{images} images of {one.rollout.steps} steps, {one.rollout.trained_steps} trained",
        [
            Measurement("ours (s)", mine.seconds[timed], 3),
            Measurement("plain loop (s)", theirs.seconds[timed], 3),
            Measurement("plain loop / ours", found.ratios[timed]),
            # Other work on the machine lengthens wall-clock time, but hardly processor time.
            Measurement("ours, processor (s)", mine.busy[timed], 3),
            Measurement("plain loop, processor (s)", theirs.busy[timed], 3),
            Measurement("plain loop / ours, processor", found.busy_ratios[timed]),
            *passes("ours", mine),
            *passes("plain loop", theirs),
            Measurement("images per second, ours", [images / taken for taken in mine.seconds[timed]], 1),
            Measurement("losses differ by, at most", [max(found.apart)], 8),
        ],
    )
