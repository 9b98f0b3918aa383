"""Division of candidates into forward passes: full batches, across groups if one does not fill them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from rollout.records import SampleRequest
from rollout.settings import RolloutSettings

Batch = tuple[SampleRequest, ...]
"""The parts of one or more groups that are sampled together."""


def batches(requests: Sequence[SampleRequest], rollout: RolloutSettings) -> list[Batch]:
    """Divide groups' candidates, in order, into batches of ``rollout.batch``; only the last may be smaller.

    A function of the groups alone, so that rounding does not depend on the worker or the time. Groups with
    randomly drawn windows may differ in their trained steps, and are batched separately.
    """
    apart = [requests] if rollout.same_window else [[request] for request in requests]
    return [batch for together in apart for batch in _filled(together, rollout.batch)]


def _filled(requests: Sequence[SampleRequest], size: int) -> Iterator[Batch]:
    rows = [(place, noise) for place, request in enumerate(requests) for noise in request.noises]
    for i in range(0, len(rows), size):
        parts = groupby(rows[i : i + size], key=lambda row: row[0])
        yield tuple(
            replace(requests[place], noises=tuple(noise for _, noise in part)) for place, part in parts
        )
