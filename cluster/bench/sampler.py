"""Our sampler, which also records log-probs, against the diffusers pipeline called for every batch of images.

Both draw batches of the same size with the same number of steps and the same guidance, and take turns; and so
do as many images of several prompts, in one shared batch and prompt by prompt.
FLOPs are those of the transformer; the peak is that of large matrix products in the same precision,
measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

from cluster.bench.subject import Subject, add_options, requests, sampler_of, subject
from cluster.bench.table import Report, Row, no_more
from cluster.bench.timing import flops_of, in_turns, matmul_peak, peak_gb, seconds
from cluster.config.errors import UserError
from rollout.families.registry import family_class
from rollout.worker import RolloutWorker


def options(parser: argparse.ArgumentParser) -> None:
    """What can be said about it."""
    add_options(parser)


def measure(options: argparse.Namespace, rest: Sequence[str]) -> Report:
    """Run both, in turns.

    Raises:
        UserError: if the prompts cannot share a batch equally, or there is no such model.
    """
    no_more(rest)
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
    return Report(
        f"{batch} images of {one.rollout.width} pixels, {one.rollout.steps} steps, {one.model.dtype}",
        [
            Row("first batch, ours (s)", [first], 1),
            Row("ours, with log-probs (s)", ours, 3),
            Row("diffusers pipeline (s)", theirs, 3),
            Row("pipeline / ours", _ratios(theirs, ours)),
            Row(f"{len(groups)} prompts, one batch (s)", times["shared"], 3),
            Row(f"{len(groups)} prompts, apart / one batch", _ratios(times["apart"], times["shared"])),
            Row("images per second, ours", [batch / a for a in ours]),
            Row("transformer GFLOPs per image", [flops / batch / 1e9]),
            Row("matrix peak (TFLOP/s)", [peak / 1e12], 3),
            Row("share of the peak, ours (%)", [100 * flops / a / peak for a in ours], 1),
            Row("peak memory (GB)", [memory], 3),
        ],
    )


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _pipeline(one: Subject, worker: RolloutWorker, text: str) -> Callable[[], Any]:
    """The pipeline as its users call it, with its autoencoder in the transformer's precision."""
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
