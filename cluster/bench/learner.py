"""Benchmark updates with KL: pairs of trajectory and step per second, FLOPs, share of the peak, memory.

The engine is DeepSpeed without ZeRO where that is installed, else plain autograd.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from cluster.bench.subject import (
    add_options,
    learner_of,
    not_compiled,
    requests,
    sampled_work,
    sampler_of,
    subject,
)
from cluster.bench.table import BenchmarkReport, Measurement, refuse_arguments
from cluster.bench.timing import flops_of, in_turns, matmul_peak, peak_gb, seconds
from learner.objectives.flow_grpo import FlowGRPOSettings
from learner.settings import LearnerSettings


def options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    add_options(parser)
    parser.add_argument("--micro-batch", type=int, help="default: the learner's own choice")
    parser.add_argument("--checkpointing", action="store_true", help="keep no activations")
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the KL; 0 omits the reference")


def measure(options: argparse.Namespace, rest: Sequence[str]) -> BenchmarkReport:
    """Sample once, then repeat the update with these trajectories."""
    refuse_arguments(rest)
    with subject(options) as one:
        settings = LearnerSettings(
            gpus=one.rollout.gpus, threads=options.threads, zero_stage=0,
            objective=FlowGRPOSettings(beta=options.beta),
            micro_batch=options.micro_batch, gradient_checkpointing=options.checkpointing,
        )  # fmt: skip
        sampled = sampled_work(sampler_of(not_compiled(one)), requests(one, options.groups), settings.updates)
        torch.cuda.empty_cache()
        learner = learner_of(one, settings)

        def work() -> None:
            learner.update(sampled)

        first = seconds(work, one.device)
        times = in_turns({"update": work}, one.device, repeats=options.repeats)["update"]
        flops = flops_of(work)
        peak, memory = matmul_peak(one.device, one.model.dtype), peak_gb(work, one.device)
    images = options.groups * options.batch
    pairs = images * one.rollout.trained_steps
    return BenchmarkReport(
        f"updates with {images} trajectories, {pairs} pairs in forwards of {learner.micro_batch}",
        [
            Measurement("first update (s)", [first], 1),
            Measurement("update (s)", times, 3),
            Measurement("pairs per second", [pairs / taken for taken in times], 1),
            Measurement("trajectories per second", [images / taken for taken in times]),
            Measurement("transformer GFLOPs per pair", [flops / pairs / 1e9]),
            Measurement("matrix peak (TFLOP/s)", [peak / 1e12], 3),
            Measurement("share of the peak (%)", [100 * flops / taken / peak for taken in times], 1),
            Measurement("peak memory (GB)", [memory], 3),
        ],
    )
