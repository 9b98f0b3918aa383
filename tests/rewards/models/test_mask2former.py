from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

from rewards.models import mask2former
from rewards.models.color_namer import cut_out
from rewards.models.detection import Detection
from rewards.models.mask2former import Instance, Mask2FormerDetector, instances
from rewards.scorers.geneval import ALIASES, CLASSES
from tests.support.reward_models import BOXES, noise_images, planted

LOW = 0.02
"""Below what a random network says of its objects, whose 81 classes are about equally likely."""


@pytest.fixture(scope="module")
def detector(random_detector: Path) -> Mask2FormerDetector:
    return Mask2FormerDetector(str(random_detector), CLASSES, ALIASES, size=64, batch=2, device="cpu")


def one_by_one(folder: Path, image: NDArray[np.uint8], threshold: float) -> list[Instance]:
    """Every pair of query and class in loops, from the published model's own outputs on one image."""
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, size={"shortest_edge": 64, "longest_edge": 106})
    inputs = processor(Image.fromarray(image), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 96)
    with torch.inference_mode():
        outputs = model(**inputs)
    masks = torch.nn.functional.interpolate(
        outputs.masks_queries_logits, size=image.shape[:2], mode="bilinear", align_corners=False
    )[0].double()  # fmt: skip
    found = []
    for query, logits in enumerate(outputs.class_queries_logits[0]):
        mask = (masks[query] > 0).numpy()
        for label, probability in enumerate(logits.softmax(0)[:-1].tolist()):
            confidence = probability * masks[query].sigmoid().numpy()[mask].mean() if mask.any() else 0.0
            if confidence > threshold:
                ys, xs = np.nonzero(mask)
                box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
                found.append(Instance(Detection(kind=CLASSES[label], confidence=confidence, box=box), mask))
    return found


def assert_same(found: Sequence[Instance], expected: Sequence[Instance]) -> None:
    def order(instance: Instance) -> tuple[str, float]:
        return instance.detection.kind, instance.detection.confidence

    assert len(found) == len(expected)
    for a, b in zip(sorted(found, key=order), sorted(expected, key=order), strict=True):
        assert a.detection.kind == b.detection.kind
        assert a.detection.confidence == pytest.approx(b.detection.confidence, abs=1e-5)
        # A pixel on the edge of a mask may fall on either side.
        np.testing.assert_allclose(a.detection.box, b.detection.box, atol=1)
        assert (a.mask == b.mask).mean() > 0.995


def test_detections_are_those_of_the_published_model(
    detector: Mask2FormerDetector, random_detector: Path
) -> None:
    images = noise_images(3, width=64)
    found = detector.detect(images, LOW)
    assert sum(map(len, found)) >= 10
    for image, objects in zip(images, found, strict=True):
        assert_same(objects, one_by_one(random_detector, image, LOW))


def test_images_are_detected_alone(detector: Mask2FormerDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise_images(5, width=64)
    together = detector.detect(images, LOW)
    for size in (1, 5):
        monkeypatch.setattr(detector, "_batch", size)
        for a, b in zip(detector.detect(images, LOW), together, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_is_near(
    device: str, random_detector: Path, detector: Mask2FormerDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        monkeypatch.setattr(mask2former, "placed", lambda _: (torch.device("cpu"), torch.bfloat16))
    reduced = Mask2FormerDetector(str(random_detector), CLASSES, ALIASES, size=64, batch=2, device="auto")
    images = noise_images(2, width=64)
    for near, exact in zip(reduced._forward(images), detector._forward(images), strict=True):
        assert (near.device.type, near.dtype) == (device, torch.float32)
        assert not torch.equal(near.cpu(), exact)
        assert (near.cpu() - exact).abs().mean() < 0.02 * exact.abs().max()
    assert sum(map(len, reduced.detect(images, LOW))) > 0


def see(*objects: tuple[str, float, tuple[float, ...]]) -> list[Instance]:
    return instances(*planted(*objects), CLASSES, (64, 64), 0.3)


def test_planted_objects_are_found_where_they_are() -> None:
    cat, dog = see(("cat", 0.9, BOXES[0]), ("dog", 0.6, BOXES[1]), ("cow", 0.3, BOXES[2]))
    assert (cat.detection.kind, cat.detection.box) == ("cat", BOXES[0])
    assert (dog.detection.kind, dog.detection.box) == ("dog", BOXES[1])
    assert cat.detection.confidence == pytest.approx(0.9, abs=1e-4)
    assert cat.mask[4:20, 4:20].all()
    assert cat.mask.sum() == 16 * 16


def test_masks_grow_to_the_size_of_the_image() -> None:
    [cat] = instances(*planted(("cat", 0.9, BOXES[0])), CLASSES, (128, 256), 0.3)
    assert cat.mask.shape == (128, 256)
    assert cat.detection.box == (16.0, 8.0, 80.0, 40.0)


def test_an_unsure_mask_lowers_the_confidence() -> None:
    classes, masks = planted(("cat", 0.8, BOXES[0]), ("dog", 0.8, BOXES[1]))
    masks[0] = masks[0].clamp(max=float(np.log(3)))  # a probability of 0.75
    masks[1] = masks[1].clamp(max=0.0)  # nowhere more likely than not
    [cat] = instances(classes, masks, CLASSES, (64, 64), 0.3)
    assert cat.detection.confidence == pytest.approx(0.6, abs=1e-4)
    assert instances(classes, masks, CLASSES, (64, 64), 0.61) == []


def test_a_query_can_be_two_things_and_boxes_may_overlap() -> None:
    classes, masks = planted(("cat", 0.5, BOXES[0]))
    classes[0, CLASSES.index("dog")] = np.log(0.4)
    classes[0, -1] = np.log(0.1)
    found = instances(classes, masks, CLASSES, (64, 64), 0.3)
    assert {instance.detection.kind for instance in found} == {"cat", "dog"}
    assert len(see(("cat", 0.9, BOXES[0]), ("cat", 0.8, BOXES[0]))) == 2


def test_cutting_out_leaves_the_object_alone() -> None:
    image = noise_images(1, 64, 64)[0]
    [cat] = see(("cat", 0.9, BOXES[1]))
    cat.mask[4:8, 40:44] = False  # a corner that is not the cat
    crop = cut_out(image, cat)
    assert crop.shape == (16, 20, 3)
    assert (crop[:4, :4] == 0x99).all()
    assert (crop[4:] == image[8:20, 40:60]).all()
    assert (crop[:4, 4:] == image[4:8, 44:60]).all()
