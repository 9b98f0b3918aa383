"""Mask2Former, the object detector of GenEval, through transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from rewards.models.detection import Box, Detection
from rewards.models.loading import explained, placed, pretrained
from rewards.scorer import RewardError

if TYPE_CHECKING:
    import torch

_STRIDE: Final = 32
"""Pixels of the input per pixel of the coarsest features; sides are multiples of this."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One detected object: its record for the rules, and its mask (H, W)."""

    detection: Detection
    mask: NDArray[np.bool_]


class Mask2FormerDetector:
    """Detector of objects in batches of ``batch`` images; bfloat16 on a GPU, float32 on a CPU.

    ``model`` is a Mask2Former for instances on the Hugging Face hub or a local folder in its format, with
    its image processor. Images are resized to a shorter side of ``size``, whatever the processor's
    configuration: the published ones have 384, less than half of the models' training size. ``aliases``
    renames its classes.
    """

    def __init__(
        self,
        model: str,
        classes: Sequence[str],
        aliases: Mapping[str, str],
        *,
        size: int,
        batch: int,
        device: str,
    ) -> None:
        """Load the processor and the model.

        Raises:
            OSError: naming the option "detector", if the model cannot be loaded or lacks one of ``classes``.
        """
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self._device, self._dtype = placed(device)
        self._batch = batch
        self._size = {"shortest_edge": size, "longest_edge": size * 5 // 3}
        expected = "a Mask2Former for COCO's instances on the hub or a local folder with one"
        with explained("detector", model, expected):
            self._processor: Any = AutoImageProcessor.from_pretrained(model)
            network = pretrained(Mask2FormerForUniversalSegmentation, model)
            labels = network.config.id2label
            self._names = [aliases.get(labels[index], labels[index]) for index in range(len(labels))]
            if unknown := sorted(set(classes) - set(self._names)):
                raise ValueError(f"it does not know {', '.join(unknown)}")
        self._network = network.to(self._device)

    def detect(self, images: NDArray[np.uint8], threshold: float) -> list[list[Instance]]:
        """Detect objects of confidence above ``threshold`` in each of (N, H, W, 3) uint8 images, unordered.

        Raises:
            RewardError: if the network's output is not finite.
        """
        import torch

        found: list[list[Instance]] = []
        with torch.inference_mode():
            for at in range(0, len(images), self._batch):
                classes, masks = self._forward(images[at : at + self._batch])
                if not (classes.isfinite().all() and masks.isfinite().all()):
                    raise RewardError("the detector's output is not finite")
                pairs = zip(classes, masks, strict=True)
                found += [instances(c, m, self._names, images.shape[1:3], threshold) for c, m in pairs]
        return found

    def _forward(self, images: NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute logits of classes (N, Q, C + 1), the last for "no object", and of masks (N, Q, h, w)."""
        import torch

        inputs = self._processor(
            list(images),
            size=self._size,
            size_divisor=_STRIDE,
            input_data_format="channels_last",
            return_tensors="pt",
            device=self._device,
        )
        # Autocast: with bfloat16 throughout, the coordinates of the deformable attention would be coarse.
        reduced = self._dtype != torch.float32
        with torch.autocast(self._device.type, torch.bfloat16, enabled=reduced):
            outputs = self._network(pixel_values=inputs["pixel_values"].to(self._device))
        return outputs.class_queries_logits.float(), outputs.masks_queries_logits.float()


def instances(
    classes: torch.Tensor,
    masks: torch.Tensor,
    names: Sequence[str],
    size: tuple[int, ...],
    threshold: float,
) -> list[Instance]:
    """Convert one image's logits (Q, C + 1) and (Q, h, w) to objects in an image of ``size`` (H, W).

    As in mmdetection, whose detector GenEval uses: any class of any query is a separate object, its
    confidence is the probability of the class times the mean of the mask's probabilities over 0.5, and its
    box is tight around the mask, right and lower edge exclusive. Boxes do not suppress each other, since
    GenEval's overlap threshold is 1.
    """
    from torch.nn.functional import interpolate

    probabilities = classes.softmax(-1)[:, :-1]
    # The mask only lowers a confidence, so most pairs need no mask in full size.
    queries, labels = (probabilities > threshold).nonzero(as_tuple=True)
    if not len(queries):
        return []
    logits = interpolate(masks[queries][None], size=tuple(size), mode="bilinear", align_corners=False)[0]
    inside = logits > 0
    quality = (logits.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    confidences = probabilities[queries, labels] * quality
    sure = confidences > threshold
    return [
        Instance(Detection(kind=names[label], confidence=confidence, box=_box(mask)), mask)
        for label, confidence, mask in zip(
            labels[sure].tolist(), confidences[sure].tolist(), inside[sure].cpu().numpy(), strict=True
        )
    ]


def _box(mask: NDArray[np.bool_]) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
