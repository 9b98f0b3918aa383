"""Diffusers pipelines that start from candidates' own noise."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from rollout.noise import initial_latents
from rollout.records import Noise


@contextmanager
def starts_from(pipeline: Any, noises: Sequence[Noise]) -> Iterator[None]:
    """Let a diffusers pipeline start from candidates' initial noise, packed or not as it draws its own."""

    def drawn(shape: Sequence[int], **_: Any) -> torch.Tensor:
        return initial_latents(noises, tuple(shape[1:]))

    with patch.object(sys.modules[type(pipeline).__module__], "randn_tensor", drawn):
        yield
