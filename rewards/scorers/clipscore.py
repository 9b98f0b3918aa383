"""CLIPScore: the agreement of an image with its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from rewards.models.open_clip import OpenClip
from rewards.scorer import Judgement, Traits, check_text
from rollout.records import Prompt

SCALE: Final = 2.5
"""The paper's w, which stretches the usual range of cosines to about 0 to 1."""


class ClipScoreScorer:
    """Scorer of (N, H, W, 3) images by 2.5 * max(cosine(image, prompt), 0), in [0, 2.5], usually 0.4 to 0.8.

    Source: CLIPScore (Hessel et al. 2021, arXiv 2104.08718), with the larger ViT-L/14 and without the
    paper's "A photo depicts", since a prompt is not a caption. ``clip``, ``clip_weights`` and
    ``clip_preprocess`` are those of `OpenClip`. The weights "openai" are the file
    open_clip_model.safetensors of timm/vit_large_patch14_clip_224.openai on the Hugging Face hub. Cost: one
    forward pass of ViT-L/14 (0.3 G parameters, 224 px) per image, one of its text tower per distinct prompt.
    """

    traits: ClassVar[Traits] = Traits(low=0.0, high=SCALE)

    def __init__(
        self,
        clip: str = "ViT-L-14-quickgelu",
        clip_weights: str = "openai",
        clip_preprocess: Mapping[str, Any] | None = None,
        device: str = "auto",
    ) -> None:
        self._clip = OpenClip(clip, clip_weights, device, preprocess=clip_preprocess)

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Score each image against its own prompt."""
        cosines = self._clip.cosines(images, [prompt.text for prompt in prompts])
        return Judgement(values=SCALE * np.maximum(cosines, 0.0), valid=np.isfinite(cosines))

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Refuse a prompt without text; see `check_text`."""
        check_text(prompt)
