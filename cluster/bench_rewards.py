"""How fast rewards are computed: OCR of small images, in one process and over a pool of shards."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import chain, cycle, islice
from typing import Final

import numpy as np
import ray
from numpy.typing import NDArray
from rich.table import Table

from cluster.shards import Shards, Span
from rewards.ocr import OcrScorer, text_recognition
from rewards.settings import RewardSettings
from rollout.records import Prompt
from rollout.tiny.prompts import split_words
from rollout.tiny.world import draw_word

IMAGES: Final = 16
"""Images per call."""
GROUPS: Final = 24
"""Calls per measurement of the pool."""
CALLS: Final = 8
"""Calls per measurement in one process."""

Images = NDArray[np.uint8]


def measure(repeats: int) -> Table:
    """Images per second of both ways, in turns; needs Ray to be up, and nothing else on the machine."""
    words = [str(line["text"]) for line in chain(*split_words())]
    prompts = [Prompt(index=i, text="", metadata={"text": word}) for i, word in enumerate(words)]
    table = Table("", "median", "lowest", "highest", title="OCR of images of 48x16 pixels, images per second")
    _one_process(table, prompts[:IMAGES], repeats)
    asyncio.run(_shards(table, list(islice(cycle(prompts), GROUPS * IMAGES)), repeats))
    return table


def _draw(prompts: Sequence[Prompt]) -> Images:
    return np.stack([draw_word(prompt.metadata["text"]) for prompt in prompts])


def _one_process(table: Table, prompts: Sequence[Prompt], repeats: int) -> None:
    """The scorer against the library's own way: every image padded to 48x320."""
    images = _draw(prompts)
    scorer, model = OcrScorer(), text_recognition(threads=1)()

    def fitted() -> list[str]:
        return [str(text) for text in scorer(images, prompts).details["text"]]

    def padded() -> list[str]:
        found = model.predict(list(np.ascontiguousarray(images[..., ::-1])), batch_size=len(images))
        return [str(line["rec_text"]) for line in found]

    different = sum(a != b for a, b in zip(fitted(), padded(), strict=True))
    rates = [(_rate(fitted), _rate(padded)) for _ in range(repeats)]
    _add(table, ("fitted to the images", "padded to 48x320"), rates)
    table.add_row("texts that differ", f"{different} of {len(images)}", "", "")


def _rate(read: Callable[[], list[str]]) -> float:
    began = time.perf_counter()
    count = sum(len(read()) for _ in range(CALLS))
    return count / (time.perf_counter() - began)


async def _shards(table: Table, prompts: Sequence[Prompt], repeats: int) -> None:
    groups = [prompts[i : i + IMAGES] for i in range(0, len(prompts), IMAGES)]
    spans = [Span(images=ray.put(_draw(group)), prompts=tuple(group)) for group in groups]
    pools = [
        Shards(RewardSettings(name="ocr", workers=workers, batch=IMAGES), groupwise=False)
        for workers in (2, 1)
    ]
    for shards in pools:
        await shards.pool.ready()
        await _pool_rate(shards, spans[:4])  # the first call of a shard makes its model
    rates = [(await _pool_rate(pools[0], spans), await _pool_rate(pools[1], spans)) for _ in range(repeats)]
    _add(table, ("two shards", "one shard"), rates)


async def _pool_rate(shards: Shards, spans: Sequence[Span]) -> float:
    began = time.perf_counter()
    judged = await asyncio.gather(*(shards.judge([span]) for span in spans))
    if not all(judgement.valid.all() for judgement in judged):
        raise RuntimeError(f"the benchmark's own images could not be scored: {shards.failure}")
    return sum(len(judgement.values) for judgement in judged) / (time.perf_counter() - began)


def _add(table: Table, names: tuple[str, str], rates: Sequence[tuple[float, float]]) -> None:
    columns = {names[0]: [a for a, _ in rates], names[1]: [b for _, b in rates]}
    for name, values in {**columns, "ratio": [a / b for a, b in rates]}.items():
        digits = 2 if name == "ratio" else 1
        cells = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{cell:.{digits}f}" for cell in cells))
