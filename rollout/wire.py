"""Spread the chunks of a batch into flat values, as Ray's ``num_returns`` wants them, and gather them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from rollout.batches import Batch
from rollout.records import Chunk


def returns(batch: Batch) -> int:
    """Count the values that `spread` makes of a batch's chunks."""
    return 1 + 2 * len(batch) + sum(len(part.noises) for part in batch)


def spread(chunks: Sequence[Chunk]) -> tuple[Any, ...]:
    """Take the large values out of chunks: the chunks without them, images, conditionings, trajectories."""
    small = [
        replace(chunk, images=None, conditioning=None, trajectories=(None,) * len(chunk.trajectories))
        for chunk in chunks
    ]
    return (
        small,
        *(chunk.images for chunk in chunks),
        *(chunk.conditioning for chunk in chunks),
        *(trajectory for chunk in chunks for trajectory in chunk.trajectories),
    )


def gather(values: Sequence[Any]) -> list[Chunk]:
    """Put handles of the large values, in the order of `spread`, back into the chunks."""
    small, *handles = values
    count = len(small)
    trajectories = iter(handles[2 * count :])
    return [
        replace(
            chunk,
            images=handles[place],
            conditioning=handles[count + place],
            trajectories=tuple(islice(trajectories, len(chunk.trajectories))),
        )
        for place, chunk in enumerate(small)
    ]
