"""PickScore, a model of human preference, as a reward: its formula on a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from rewards.models.loading import explained, placed, pretrained
from rewards.scorer import Judgement, Traits, check_text
from rollout.records import Prompt

if TYPE_CHECKING:
    import torch

SCALE: Final = 26.0
"""FlowGRPO divides PickScore's logits by this, so that good images score about 0.85 to 0.95."""
MODEL: Final = "yuvalkirstain/PickScore_v1"
PROCESSOR: Final = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Processor of the published model, as in its authors' example."""
_LARGEST_LOGIT: Final = 100.0


class PickScoreScorer:
    """Scorer of (N, H, W, 3) images by exp(logit scale) * cosine(image, prompt) / 26.

    Source: PickScore (Kirstain et al. 2023, arXiv 2305.01569). ``model`` and ``processor`` are names on
    the Hugging Face hub or local folders in its format; without ``processor``, any model but the published
    one must include its own, since another mean and spread would distort its scores. bfloat16 on a GPU,
    float32 on a CPU. Not thread-safe, because its tokenizer is not.
    """

    traits: ClassVar[Traits] = Traits(low=-_LARGEST_LOGIT / SCALE, high=_LARGEST_LOGIT / SCALE)

    def __init__(
        self,
        model: str = MODEL,
        processor: str | None = None,
        device: str = "auto",
    ) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self._device, dtype = placed(device)
        with explained("model", model, "a CLIP model on the hub or a local folder with one"):
            self._model = pretrained(CLIPModel, model)
        # Read before the cast: bfloat16 would make the published scale of 100 one of 98.9.
        self._scale = float(self._model.logit_scale.detach().exp()) / SCALE
        self._model.to(self._device, dtype)
        processor = processor or (PROCESSOR if model == MODEL else model)
        with explained("processor", processor, "a CLIP processor on the hub or a local folder with one"):
            self._processor: Any = CLIPProcessor.from_pretrained(processor)

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Score each image against its own prompt; a repeated prompt is encoded once."""
        import torch

        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        rows = [texts.index(prompt.text) for prompt in prompts]
        with torch.inference_mode():
            cosines = (self._encode_images(images) * self._encode_texts(texts)[rows]).sum(-1)
            values = self._scale * cosines
        scores = values.cpu().numpy().astype(np.float64)
        return Judgement(values=scores, valid=np.isfinite(scores))

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Refuse a prompt without text; see `check_text`."""
        check_text(prompt)

    def _encode_images(self, images: NDArray[np.uint8]) -> torch.Tensor:
        inputs = self._processor.image_processor(
            list(images), return_tensors="pt", input_data_format="channels_last"
        )
        pixels = inputs["pixel_values"].to(self._device, self._model.dtype)
        return _unit(self._model.get_image_features(pixel_values=pixels).pooler_output)

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        longest = self._model.config.text_config.max_position_embeddings
        inputs = self._processor.tokenizer(
            texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        return _unit(self._model.get_text_features(**inputs.to(self._device)).pooler_output)


def _unit(features: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import normalize

    return normalize(features.float(), dim=-1)
