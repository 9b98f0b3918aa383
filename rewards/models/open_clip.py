"""CLIP models through open_clip; the only file that imports it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from rewards.models.clip_preprocessing import (
    HUB_CONFIG,
    OPENCLIP_CONFIG,
    Preprocessing,
    common_to_all,
    own_fields,
    parse_preprocessing,
    read_beside,
)
from rewards.models.loading import explained, placed

if TYPE_CHECKING:
    import torch

NEEDED: Final = (
    "the mean and standard deviation that the weights were trained with, such as "
    "{ mean = [0.5, 0.5, 0.5], std = [0.5, 0.5, 0.5] }"
)
_AT_ONCE: Final = 64
"""Images per forward pass: enough to fill a GPU, with memory bounded for any number of candidates."""


class OpenClip:
    """Encoder of images and texts to unit vectors; bfloat16 on a GPU, float32 on a CPU.

    ``model`` is the name of an open_clip architecture, whose ``weights`` are a tag of it or a local file
    (.safetensors, .pt), or a local folder in open_clip's format, which includes its weights. The scorers'
    options are "clip" for the model and ``option`` for the weights. ``preprocess`` (the option
    "clip_preprocess") is the `Preprocessing` that the weights were trained with; by default it is the tag's,
    or that of a configuration beside the file, or that of all published weights of the architecture if they
    agree. ``resize`` overrides how an image that is not square is fitted: "shortest" (fill and crop),
    "longest" (pad) or "squash".
    """

    def __init__(
        self,
        model: str,
        weights: str,
        device: str,
        *,
        option: str = "clip_weights",
        preprocess: Mapping[str, Any] | None = None,
        resize: str | None = None,
    ) -> None:
        """Load the tokenizer and the model.

        Raises:
            OSError: naming the option, if there are no such weights, they do not fit, they were trained with
                another GELU than the architecture has, or their preprocessing is unknown.
        """
        import open_clip
        import torch

        self.device, self._dtype = placed(device)
        local = Path(model).is_dir()
        name = f"local-dir:{model}" if local else model
        with explained("clip", model, "an open_clip architecture or a folder in its format"):
            self._tokenizer: Any = _tokenizer(name)
        with explained("clip_preprocess", preprocess, NEEDED):
            needs = _preprocessing(model, weights, local, preprocess)
        blamed = ("clip", model) if local else (option, weights)
        expected = f"weights of {model}, as a tag that open_clip can download or a local file"
        with explained(*blamed, expected), warnings.catch_warnings():
            # open_clip would only warn and compute features that are slightly wrong.
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            self._model, self._transform = open_clip.create_model_from_pretrained(
                name,
                pretrained=None if local else weights,
                precision="bf16" if self._dtype == torch.bfloat16 else "fp32",
                device=self.device,
                image_mean=needs.mean,
                image_std=needs.std,
                image_interpolation=needs.interpolation,
                image_resize_mode=resize or needs.resize_mode,
            )
        self._model.eval()

    def images(self, images: Iterable[NDArray[np.uint8]]) -> torch.Tensor:
        """Encode N images (H, W, 3) uint8, which may differ in size, to unit vectors (N, D) float32."""
        import torch
        from PIL import Image

        pixels = [self._transform(Image.fromarray(image)) for image in images]
        with torch.inference_mode():
            parts = [
                self._model.encode_image(torch.stack(pixels[at : at + _AT_ONCE]).to(self.device, self._dtype))
                for at in range(0, len(pixels), _AT_ONCE)
            ]
            return _unit(torch.cat(parts))

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode N texts, truncated to the model's length, to unit vectors (N, D) float32."""
        import torch

        with torch.inference_mode():
            return _unit(self._model.encode_text(self._tokenizer(list(texts)).to(self.device)))

    def cosines(self, images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float64]:
        """Compute the cosine (N,) of every image with its own text; a repeated text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        rows = [distinct.index(text) for text in texts]
        cosines = (self.images(images) * self.texts(distinct)[rows]).sum(-1)
        return cosines.cpu().numpy().astype(np.float64)


def _tokenizer(name: str) -> Any:
    import open_clip

    # Without this check, an unknown name would get the default tokenizer.
    if open_clip.get_model_config(name) is None:
        raise ValueError("no such architecture, or no such folder")
    return open_clip.get_tokenizer(name)


def _preprocessing(model: str, weights: str, local: bool, given: Mapping[str, Any] | None) -> Preprocessing:
    """Find the preprocessing of some weights.

    Raises:
        ValueError: if no source states it.
    """
    import open_clip

    if given is not None:
        return parse_preprocessing(given)
    if tag := open_clip.get_pretrained_cfg(model, weights):
        return parse_preprocessing(own_fields(tag))
    tags = open_clip.list_pretrained_tags_by_model(model)
    file = Path(model) / OPENCLIP_CONFIG if local else Path(weights)
    found = read_beside(file) or common_to_all(open_clip.get_pretrained_cfg(model, tag) for tag in tags)
    if found is None:
        raise ValueError(
            f"neither {OPENCLIP_CONFIG} nor {HUB_CONFIG} is beside {file}, and the published weights of "
            f"{model} do not agree"
        )
    return found


def _unit(features: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import normalize

    return normalize(features.float(), dim=-1)
