"""Benchmark rewards: OCR of small images, in one process and over a pool of replicas."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from itertools import chain, cycle, islice
from typing import Final

import numpy as np
import ray
from numpy.typing import NDArray

from cluster.actors.connection import connect
from cluster.actors.reward_pool import RewardPool
from cluster.bench.table import BenchmarkReport, Measurement, refuse_arguments
from cluster.config.settings import ClusterSettings
from rewards.scorers.ocr import OcrScorer, text_recognition
from rewards.settings import RewardSettings
from rewards.spans import Span
from rollout.records import Prompt
from rollout.tiny.prompt_files import split_words
from rollout.tiny.world import draw_word

IMAGES: Final = 16
"""Images per call."""
GROUPS: Final = 24
"""Calls per measurement of the pool."""
CALLS: Final = 8
"""Calls per measurement in one process."""

Images = NDArray[np.uint8]


def options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--repeats", type=int, default=3)


def measure(options: argparse.Namespace, rest: Sequence[str]) -> BenchmarkReport:
    """Measure images per second of both, in turns, on an otherwise idle machine."""
    refuse_arguments(rest)
    words = [str(line["text"]) for line in chain(*split_words())]
    prompts = [Prompt(index=i, text="", metadata={"text": word}) for i, word in enumerate(words)]
    rows = _one_process(prompts[:IMAGES], options.repeats)
    connect(ClusterSettings())
    try:
        rows += asyncio.run(_replicas(list(islice(cycle(prompts), GROUPS * IMAGES)), options.repeats))
    finally:
        ray.shutdown()
    return BenchmarkReport("OCR of images of 48x16 pixels, images per second", rows)


def _draw(prompts: Sequence[Prompt]) -> Images:
    return np.stack([draw_word(prompt.metadata["text"]) for prompt in prompts])


def _one_process(prompts: Sequence[Prompt], repeats: int) -> list[Measurement]:
    """Compare the scorer with the library's own padding of every image to 48x320."""
    images = _draw(prompts)
    scorer, model = OcrScorer(), text_recognition(threads=1)()

    def fitted() -> list[str]:
        return [str(text) for text in scorer(images, prompts).details["text"]]

    def padded() -> list[str]:
        found = model.predict(list(np.ascontiguousarray(images[..., ::-1])), batch_size=len(images))
        return [str(line["rec_text"]) for line in found]

    different = sum(a != b for a, b in zip(fitted(), padded(), strict=True))
    rates = [(_rate(fitted), _rate(padded)) for _ in range(repeats)]
    differ = Measurement(f"texts that differ, of {len(images)}", [different], 0)
    return [*_rows(("fitted to the images", "padded to 48x320"), rates), differ]


def _rate(read: Callable[[], list[str]]) -> float:
    began = time.perf_counter()
    count = sum(len(read()) for _ in range(CALLS))
    return count / (time.perf_counter() - began)


async def _replicas(prompts: Sequence[Prompt], repeats: int) -> list[Measurement]:
    groups = [prompts[i : i + IMAGES] for i in range(0, len(prompts), IMAGES)]
    spans = [Span(images=ray.put(_draw(group)), prompts=tuple(group)) for group in groups]
    pools = [
        RewardPool(RewardSettings(name="ocr", workers=workers, batch=IMAGES), groupwise=False)
        for workers in (2, 1)
    ]
    for pool in pools:
        await pool.pool.ready()
        await _pool_rate(pool, spans[:4])  # the first call of a replica loads its model
    rates = [(await _pool_rate(pools[0], spans), await _pool_rate(pools[1], spans)) for _ in range(repeats)]
    return _rows(("two replicas", "one replica"), rates)


async def _pool_rate(pool: RewardPool, spans: Sequence[Span]) -> float:
    began = time.perf_counter()
    scored = await asyncio.gather(*(pool.score([span]) for span in spans))
    if not all(judgement.valid.all() for judgement in scored):
        raise RuntimeError(f"the benchmark's own images could not be scored: {pool.failure}")
    return sum(len(judgement.values) for judgement in scored) / (time.perf_counter() - began)


def _rows(names: tuple[str, str], rates: Sequence[tuple[float, float]]) -> list[Measurement]:
    first, second = names
    return [
        Measurement(first, [a for a, _ in rates], 1),
        Measurement(second, [b for _, b in rates], 1),
        Measurement(f"{first} / {second}", [a / b for a, b in rates]),
    ]
