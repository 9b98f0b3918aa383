"""The seeds of images that are not finite, as a run folder records them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from cluster.record.held_out import Drawn
from rollout.records import SampleRequest

BROKEN: Final = "broken_images"
"""The metric that counts such images of a step."""
EVAL_BROKEN: Final = f"eval_{BROKEN}"
"""The metric that counts such images of an evaluation."""

Named = Mapping[str, Any]


def broken_candidates(request: SampleRequest, finite: Sequence[bool], kind: str = "candidate") -> list[Named]:
    """List the candidates of a group (or with another ``kind`` its drafts) that are not finite."""
    return [
        {"group": request.group_id, kind: place, "prompt": request.prompt.text, **asdict(noise)}
        for place, (noise, good) in enumerate(zip(request.noises, finite, strict=True))
        if not good
    ]


def broken_held_out(drawn: Sequence[Drawn], finite: Sequence[bool]) -> list[Named]:
    """List the held-out images that are not finite."""
    return [
        {"prompt_index": prompt.index, "sample": sample, "prompt": prompt.text, "initial": noise.initial}
        for (prompt, sample, noise), good in zip(drawn, finite, strict=True)
        if not good
    ]
