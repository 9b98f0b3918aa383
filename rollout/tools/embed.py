"""Encode prompts beforehand into ``rollout.embeddings``, after which samplers load no text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rollout.families.registry import load_policy
from rollout.settings import ModelSettings, RolloutSettings


def fill(model: ModelSettings, rollout: RolloutSettings, texts: Iterable[str], device: str) -> Iterator[str]:
    """Encode every prompt that is not in the folder yet, and with guidance the empty one; yield them in turn.

    One at a time, as samplers do, so that the embeddings have the same values.
    """
    policy: Any = load_policy(model, rollout, device="meta", seed=0, whole=False)
    policy.load_text(device)
    for text in texts:
        policy.encode(text)
        yield text
