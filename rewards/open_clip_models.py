"""CLIP models through open_clip: the one file that imports it, for every scorer that compares by them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from rewards.loading import explained, placed

if TYPE_CHECKING:
    import torch

_AT_ONCE: Final = 64
"""Images per forward pass: enough to fill a GPU, and memory stays bounded for any number of candidates."""


class OpenClip:
    """Encodes images and texts to unit vectors; bfloat16 on a GPU, float32 on a CPU.

    ``model`` is the name of an open_clip architecture, whose ``weights`` are a tag of it or a local file
    (.safetensors, .pt), or a local folder in open_clip's format, which brings its own weights. Scorers call
    their options so: "clip", and ``option`` for the weights. ``resize`` is "shortest" (fill the input and
    crop) or "longest" (fit and pad). Raises ``OSError`` naming the option when there are no such weights,
    when they do not fit, or when they were trained with another GELU than the architecture has.
    """

    def __init__(
        self,
        model: str,
        weights: str,
        device: str,
        *,
        option: str = "clip_weights",
        resize: str = "shortest",
    ) -> None:
        import open_clip
        import torch

        self.device, self._dtype = placed(device)
        local = Path(model).is_dir()
        name = f"local-dir:{model}" if local else model
        with explained("clip", model, "an open_clip architecture or a folder in its format"):
            self._tokenizer: Any = _tokenizer(name)
        blamed = ("clip", model) if local else (option, weights)
        expected = f"weights of {model}, as a tag that open_clip can download or a local file"
        with explained(*blamed, expected), warnings.catch_warnings():
            # It would merely warn and go on with features that are wrong by a little.
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            self._model, self._transform = open_clip.create_model_from_pretrained(
                name,
                pretrained=None if local else weights,
                precision="bf16" if self._dtype == torch.bfloat16 else "fp32",
                device=self.device,
                image_resize_mode=resize,
            )
        self._model.eval()

    def images(self, images: Iterable[NDArray[np.uint8]]) -> torch.Tensor:
        """Unit vectors (N, D) float32 of N images (H, W, 3) uint8, which may differ in size."""
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
        """Unit vectors (N, D) float32 of N texts; what is too long for the model is cut."""
        import torch

        with torch.inference_mode():
            return _unit(self._model.encode_text(self._tokenizer(list(texts)).to(self.device)))

    def cosines(self, images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float64]:
        """The cosine (N,) of every image with its own text; a repeated text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        rows = [distinct.index(text) for text in texts]
        cosines = (self.images(images) * self.texts(distinct)[rows]).sum(-1)
        return cosines.cpu().numpy().astype(np.float64)


def _tokenizer(name: str) -> Any:
    import open_clip

    # Without this, an unknown name would get the default tokenizer.
    if open_clip.get_model_config(name) is None:
        raise ValueError("no such architecture, or no such folder")
    return open_clip.get_tokenizer(name)


def _unit(features: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import normalize

    return normalize(features.float(), dim=-1)
