"""JPEG size as a reward without weights or prompts, to smoke-test a whole installation."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards.scorer import Judgement, Traits
from rollout.records import Prompt

QUALITY: Final = 95
SCALE: Final = 500_000
BOUND: Final = 10.0


class JpegScorer:
    """Scorer by kilobytes of the JPEG at quality 95 over 500 (DDPO, arXiv 2305.13301), cut at 10.

    ``prefer`` selects small files (negative scores, highest for a flat image) or large ones.
    """

    traits: ClassVar[Traits] = Traits(low=-BOUND, high=BOUND, thread_safe=True)

    def __init__(self, prefer: Literal["small", "large"] = "small") -> None:
        if prefer not in ("small", "large"):
            raise ValueError(f"prefer must be 'small' or 'large', got {prefer!r}")
        self._sign = -1.0 if prefer == "small" else 1.0

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Score (N, H, W, 3) images; the prompts are ignored."""
        sizes = np.array([jpeg_bytes(image) for image in images], dtype=np.float64)
        values = self._sign * np.minimum(sizes / SCALE, BOUND)
        return Judgement(values=values, valid=np.ones(len(images), dtype=np.bool_))

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Accept every prompt."""


def jpeg_bytes(image: NDArray[np.uint8]) -> int:
    """Return the size in bytes of the JPEG of an (H, W, 3) image at quality 95."""
    stream = BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=QUALITY)
    return stream.tell()
