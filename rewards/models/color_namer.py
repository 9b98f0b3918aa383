"""GenEval's zero-shot classifier of an object's colour, on CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from rewards.models.mask2former import Instance
from rewards.models.open_clip import OpenClip
from rewards.scorer import RewardError

if TYPE_CHECKING:
    import torch

COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES: Final = (
    "a photo of a {color} {kind}",
    "a photo of a {color}-colored {kind}",
    "a photo of a {color} object",
)
GREY: Final = 0x99
"""Level with which GenEval covers everything but the object."""


class ColorNamer:
    """Classifier of objects' colours; texts are encoded once per class of object."""

    def __init__(self, clip: OpenClip) -> None:
        self._clip = clip
        self._by_kind: dict[str, torch.Tensor] = {}

    def __call__(self, crops: Sequence[NDArray[np.uint8]], kinds: Sequence[str]) -> list[str]:
        """Name the colour of each of N crops (h, w, 3) of objects of the given classes.

        The nearest of ten text vectors wins, each the mean over `TEMPLATES`.

        Raises:
            RewardError: if the features are not finite.
        """
        import torch

        if not crops:
            return []
        classifiers = torch.stack([self._classifier(kind) for kind in kinds])
        scores = torch.einsum("nd,ncd->nc", self._clip.images(crops), classifiers)
        if not scores.isfinite().all():
            raise RewardError("CLIP's features of an object are not finite")
        return [COLORS[index] for index in scores.argmax(1).tolist()]

    def _classifier(self, kind: str) -> torch.Tensor:
        """Compute the unit text vectors (10, D) of a class, one per colour."""
        from torch.nn.functional import normalize

        if kind not in self._by_kind:
            texts = [template.format(color=color, kind=kind) for color in COLORS for template in TEMPLATES]
            vectors = self._clip.texts(texts).reshape(len(COLORS), len(TEMPLATES), -1)
            self._by_kind[kind] = normalize(vectors.mean(1), dim=-1)
        return self._by_kind[kind]


def cut_out(image: NDArray[np.uint8], instance: Instance) -> NDArray[np.uint8]:
    """Crop an (H, W, 3) image to an object's box, with everything outside its mask grey."""
    left, top, right, bottom = (int(edge) for edge in instance.detection.box)
    alone = np.where(instance.mask[..., None], image, np.uint8(GREY))
    return alone[top:bottom, left:right]
