"""HPS v2.1, a model of human preference, as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from rewards.models.loading import explained
from rewards.models.open_clip import OpenClip
from rewards.scorer import Judgement, Traits, check_text
from rollout.records import Prompt

ARCHITECTURE: Final = "ViT-H-14"
"""The model's name in open_clip."""
PREPROCESSING: Final = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
}
"""Preprocessing of the weights that it was tuned from, laion2b_s32b_b79k, which its authors kept."""
CHECKPOINT: Final = "HPS_v2.1_compressed.pt"
"""The file of version 2.1 in the authors' repository on the hub."""


class HpsV2Scorer:
    """Scorer of (N, H, W, 3) images by cosine(image, prompt), in [-1, 1], usually 0.2 to 0.35.

    Source: Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341), whose tables show 100 times this.
    As there, an image that is not square is padded, not cropped. ``weights`` is a local copy of
    HPS_v2.1_compressed.pt, or a repository on the Hugging Face hub that holds it. Cost: one forward pass of
    ViT-H/14 (0.6 G parameters, 224 px) per image, one of its text tower (0.35 G) per distinct prompt.
    """

    traits: ClassVar[Traits] = Traits(low=-1.0, high=1.0)

    def __init__(self, weights: str = "xswu/HPSv2", device: str = "auto") -> None:
        self._clip = OpenClip(
            ARCHITECTURE,
            _local(weights),
            device,
            option="weights",
            preprocess=PREPROCESSING,
            resize="longest",
        )

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Score each image against its own prompt."""
        cosines = self._clip.cosines(images, [prompt.text for prompt in prompts])
        return Judgement(values=cosines, valid=np.isfinite(cosines))

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Refuse a prompt without text; see `check_text`."""
        check_text(prompt)


def _local(weights: str) -> str:
    """Return the path itself if there is such a file, else the path of the hub's file after a download."""
    from huggingface_hub import hf_hub_download

    if Path(weights).is_file():
        return weights
    with explained("weights", weights, f"a local {CHECKPOINT} or a hub repository that holds it"):
        return hf_hub_download(weights, CHECKPOINT)
