"""Compare our sampler, which also records log-probs, with a call of the diffusers pipeline per batch.

Both draw batches of the same size with the same number of steps and the same guidance, in turns. The same
number of images of several prompts is also drawn in one shared batch and prompt by prompt. FLOPs are those of
the transformer; the peak is that of large matrix products in the same precision, measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

from cluster.bench.subject import Subject, add_options, requests, sampler_of, subject
from cluster.bench.table import BenchmarkReport, Measurement, refuse_arguments
from cluster.bench.timing import flops_of, in_turns, matmul_peak, peak_gb, seconds
from cluster.config.errors import UserError
from rollout.families.registry import family_class
from rollout.worker import RolloutWorker


def options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    add_options(parser)


def measure(options: argparse.Namespace, rest: Sequence[str]) -> BenchmarkReport:
    """Run both, in turns.

    Raises:
        UserError: if the prompts cannot share a batch equally, or the model does not exist.
    """
    refuse_arguments(rest)
    if options.batch % options.groups:
        raise UserError(f"--groups: got {options.groups}, expected a divisor of --batch {options.batch}")
    with subject(options) as one:
        worker = sampler_of(one)
        (asked,), groups = requests(one, 1), requests(one, options.groups, share=options.groups)
        first = seconds(lambda: worker.sample([asked]), one.device)
        times = in_turns(
            {
                "ours": lambda: worker.sample([asked]),
                "pipeline": _pipeline(one, worker, asked.prompt.text),
                "shared": lambda: worker.sample(groups),
                "apart": lambda: [worker.sample([group]) for group in groups],
            },
            one.device,
            repeats=options.repeats,
        )
        flops = flops_of(lambda: worker.sample([asked]), type(worker.policy.transformer).__name__)
        peak = matmul_peak(one.device, one.model.dtype)
        memory = peak_gb(lambda: worker.sample([asked]), one.device)
    ours, theirs, batch = times["ours"], times["pipeline"], one.rollout.batch
    apart = _ratios(times["apart"], times["shared"])
    return BenchmarkReport(
        f"{batch} images of {one.rollout.width} pixels, {one.rollout.steps} steps, {one.model.dtype}",
        [
            Measurement("first batch, ours (s)", [first], 1),
            Measurement("ours, with log-probs (s)", ours, 3),
            Measurement("diffusers pipeline (s)", theirs, 3),
            Measurement("pipeline / ours", _ratios(theirs, ours)),
            Measurement(f"{len(groups)} prompts, one batch (s)", times["shared"], 3),
            Measurement(f"{len(groups)} prompts, apart / one batch", apart),
            Measurement("images per second, ours", [batch / a for a in ours]),
            Measurement("transformer GFLOPs per image", [flops / batch / 1e9]),
            Measurement("matrix peak (TFLOP/s)", [peak / 1e12], 3),
            Measurement("share of the peak, ours (%)", [100 * flops / a / peak for a in ours], 1),
            Measurement("peak memory (GB)", [memory], 3),
        ],
    )


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _pipeline(one: Subject, worker: RolloutWorker, text: str) -> Callable[[], Any]:
    """Build a typical call of the pipeline, with its autoencoder in the transformer's precision."""
    loaded = worker.policy.pipeline
    vae = copy.deepcopy(loaded.vae).to(worker.policy.dtype)
    pipeline = type(loaded)(**{**loaded.components, "vae": vae})
    pipeline.set_progress_bar_config(disable=True)
    arguments = family_class(one.model.path).arguments(one.rollout)
    return lambda: pipeline(
        prompt=[text] * one.rollout.batch,
        width=one.rollout.width,
        height=one.rollout.height,
        num_inference_steps=one.rollout.steps,
        output_type="np",
        **arguments,
    )
