"""Compare a training step of our sampler and learner with a straightforward loop of the same maths.

Both sample the same images from the same seeds and train the same trajectories with KL, in turns. The plain
loop starts every step from our weights, so the losses must agree. It is never compiled, as published.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

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

    def step(self, step: int) -> tuple[float, RankUpdate]:
        """Make a step, and return its loss and the work of the update."""
        asked = requests(self.one, self.groups, step)
        work = sampled_work(self.sampler, asked, self.learner.settings.updates)
        loss = self.learner.update(work).metrics["loss"]
        for number, (digest, flat) in enumerate(self.learner.publish()):
            assert flat is not None
            self.sampler.load(WeightsId(0), number, self.learner.parts(), digest, flat)
        return loss, work


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


@dataclass(frozen=True, slots=True)
class Turn:
    """The wall-clock and processor seconds of both, and the difference of their losses."""

    ours: float
    plain: float
    ours_busy: float
    plain_busy: float
    difference: float


def turn(one: Subject, ours: ServiceStep, plain: PlainLoop, groups: int, step: int) -> Turn:
    """Let both make a step from the same weights."""
    start_from(plain, [p for _, p in ours.learner.parameters])
    asked = requests(one, groups, step)
    results: list[tuple[float, RankUpdate]] = []
    losses: list[float] = []
    busy = [time.process_time()]
    first = seconds(lambda: results.append(ours.step(step)), one.device)
    busy.append(time.process_time())
    ((loss, work),) = results
    second = seconds(lambda: losses.append(plain.step(asked, work.shares)), one.device)
    busy.append(time.process_time())
    return Turn(first, second, busy[1] - busy[0], busy[2] - busy[1], abs(loss - losses[0]))


def _report(
    options: argparse.Namespace, one: Subject, ours: ServiceStep, plain: PlainLoop
) -> BenchmarkReport:
    steps = range(options.warmup + options.repeats)
    turns = [turn(one, ours, plain, options.groups, step) for step in steps]
    timed = turns[options.warmup :]
    images = options.groups * options.batch
    return BenchmarkReport(
        f"{images} images of {one.rollout.steps} steps, {one.rollout.trained_steps} trained",
        [
            Measurement("ours (s)", [turn.ours for turn in timed], 3),
            Measurement("plain loop (s)", [turn.plain for turn in timed], 3),
            Measurement("plain loop / ours", [turn.plain / turn.ours for turn in timed]),
            # Other work on the machine lengthens wall-clock time, but hardly processor time.
            Measurement("the same in processor time", [turn.plain_busy / turn.ours_busy for turn in timed]),
            Measurement("images per second, ours", [images / turn.ours for turn in timed], 1),
            Measurement("losses differ by, at most", [max(turn.difference for turn in turns)], 8),
        ],
    )
