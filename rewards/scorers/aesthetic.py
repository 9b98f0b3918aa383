"""The LAION aesthetic predictor: the look of an image, whatever its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from rewards.models.loading import explained
from rewards.models.open_clip import OpenClip
from rewards.scorer import Judgement, Traits
from rollout.records import Prompt

if TYPE_CHECKING:
    import torch

SOURCE: Final = "github.com/christophschuhmann/improved-aesthetic-predictor"
"""Repository of the head and its weights."""


class AestheticScorer:
    """Scorer of (N, H, W, 3) images by the LAION head on the unit image vector of CLIP ViT-L/14.

    Source: the improved-aesthetic-predictor of `SOURCE`. The head was trained on ratings from 1 to 10, the
    declared range, but is linear and can go beyond; 4 to 7 is usual. ``head`` is a local copy of
    sac+logos+ava1-l14-linearMSE.pth or of its tensors as .safetensors; ``clip``, ``clip_weights`` and
    ``clip_preprocess`` are those of `OpenClip`, which must have 768 dimensions. Cost: one forward pass of
    ViT-L/14 (0.3 G parameters, 224 px) per image; prompts cost nothing.
    """

    traits: ClassVar[Traits] = Traits(low=1.0, high=10.0)

    def __init__(
        self,
        head: str | None = None,
        clip: str = "ViT-L-14-quickgelu",
        clip_weights: str = "openai",
        clip_preprocess: Mapping[str, Any] | None = None,
        device: str = "auto",
    ) -> None:
        with explained("head", head, f"the path of sac+logos+ava1-l14-linearMSE.pth from {SOURCE}"):
            self._head = _load_head(head)
        self._clip = OpenClip(clip, clip_weights, device, preprocess=clip_preprocess)
        self._head.to(self._clip.device)

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Score each image; the prompts are ignored."""
        import torch

        with torch.inference_mode():
            scores = self._head(self._clip.images(images)).squeeze(-1)
        values = scores.cpu().numpy().astype(np.float64)
        return Judgement(values=values, valid=np.isfinite(values))

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Accept every prompt."""


def _load_head(path: str | None) -> torch.nn.Module:
    import torch
    from safetensors.torch import load_file

    if path is None:
        raise ValueError("the option is not set")
    if Path(path).suffix == ".safetensors":
        tensors: Any = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    head = _build_head()
    head.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in tensors.items()})
    return head.eval()


def _build_head() -> torch.nn.Module:
    """Build the predictor's own architecture: linear layers with only dropout between them."""
    from torch.nn import Dropout, Linear, Sequential

    return Sequential(
        *(Linear(768, 1024), Dropout(0.2)),
        *(Linear(1024, 128), Dropout(0.2)),
        *(Linear(128, 64), Dropout(0.1)),
        Linear(64, 16),
        Linear(16, 1),
    )
