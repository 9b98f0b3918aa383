"""GenEval on real images, without its unmaintained detector stack, as a reward for composition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rewards.models.color_namer import COLORS, ColorNamer, cut_out
from rewards.models.detection import Detection
from rewards.models.mask2former import Instance, Mask2FormerDetector
from rewards.models.open_clip import OpenClip
from rewards.scorer import Judgement, Traits
from rewards.scorers.geneval_flow_grpo import flow_grpo_score
from rewards.scorers.geneval_rules import RuleResult, Rules, apply_rules, check_metadata, to_judgement
from rollout.records import Prompt

RULES: Final = Rules()
LOWEST: Final = 2.0 - RULES.max_objects
"""The lowest score by ``flow_grpo_score``: one object is asked for, and the most are found."""
CLASSES: Final = " ".join(
    """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
    hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
    zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports
    ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine
    glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
    dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
    """.split()
).split(", ")
"""GenEval's names of COCO's 80 classes."""
ALIASES: Final = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""Other names that detectors use: the first three are COCO's own, the others are from older lists."""


class GenEvalScorer:
    """Scorer of (N, H, W, 3) images by the soft score of GenEval's rules (`apply_rules`), in [0, 1].

    ``details["strict"]`` is GenEval's accuracy (Ghosh et al. 2023, arXiv 2310.11513), with its thresholds
    (0.3, 0.9 when counting, 16 objects of a class, no suppression of overlaps) and its colours by CLIP
    ViT-L/14. Its Mask2Former Swin-S is the one of transformers, not of mmdetection, whose weights were
    trained separately: expect the results to agree on most images, not on all.

    ``reward = "flow_grpo"`` scores by FlowGRPO's own soft score (`flow_grpo_score`), down to -14. What it
    calls strict, exact counts, is not reported.

    ``detector`` is a Mask2Former on the Hugging Face hub or a local folder, ``clip``,
    ``clip_weights`` and ``clip_preprocess`` are those of `OpenClip`. The detector sees ``batch`` images at
    once, their shorter side at ``detector_size`` pixels: GenEval's is 800, and the cost grows with the
    square. Needs GenEval metadata with COCO's classes. Cost: the detector (69 M parameters) per image, and a
    forward pass of ViT-L/14 (0.3 G, 224 px) per object whose colour matters; 10 s and 2.5 s on one CPU core,
    so meant for a GPU.
    """

    traits: ClassVar[Traits] = Traits(low=0.0, high=1.0)

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "ViT-L-14-quickgelu",
        clip_weights: str = "openai",
        clip_preprocess: Mapping[str, Any] | None = None,
        detector_size: int = 800,
        batch: int = 8,
        device: str = "auto",
        reward: Literal["soft", "flow_grpo"] = "soft",
    ) -> None:
        if reward not in ("soft", "flow_grpo"):
            raise ValueError(f"reward must be 'soft' or 'flow_grpo', got {reward!r}")
        self._flow_grpo = reward == "flow_grpo"
        if self._flow_grpo:
            self.traits = replace(self.traits, low=LOWEST)  # type: ignore[misc]
        for name, value in (("detector_size", detector_size), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._detector = Mask2FormerDetector(
            detector, CLASSES, ALIASES, size=detector_size, batch=batch, device=device
        )
        self._colors = ColorNamer(OpenClip(clip, clip_weights, device, preprocess=clip_preprocess))

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Detect the objects of every image, name the colours that its metadata uses, and apply the rules."""
        found = self._detector.detect(images, RULES.threshold)
        detections = self._colored(images, found, [prompt.metadata for prompt in prompts])
        return to_judgement(
            [self._rated(one, p.metadata) for one, p in zip(detections, prompts, strict=True)]
        )

    def _rated(self, objects: Sequence[Detection], metadata: Mapping[str, Any]) -> RuleResult:
        found = apply_rules(objects, metadata, RULES)
        return replace(found, soft=flow_grpo_score(objects, metadata, RULES)) if self._flow_grpo else found

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Refuse metadata that is not GenEval's with its classes and colours.

        Raises:
            ValueError: naming the key or value.
        """
        check_metadata(prompt.metadata, CLASSES, COLORS)

    def _colored(
        self,
        images: NDArray[np.uint8],
        found: Sequence[Sequence[Instance]],
        metadata: Sequence[Mapping[str, Any]],
    ) -> list[list[Detection]]:
        """Add the colours that the rules will use to the detections, all named in one batch."""
        detections = [[instance.detection for instance in objects] for objects in found]
        needed = [
            (image, index)
            for image, line in enumerate(metadata)
            for index in color_needed(detections[image], line)
        ]
        crops = [cut_out(images[image], found[image][index]) for image, index in needed]
        kinds = [detections[image][index].kind for image, index in needed]
        for (image, index), color in zip(needed, self._colors(crops, kinds), strict=True):
            detections[image][index] = replace(detections[image][index], color=color)
        return detections


def color_needed(detections: Sequence[Detection], metadata: Mapping[str, Any]) -> list[int]:
    """Return the detections whose colour the rules use: the most confident of a class, up to its count."""
    wanted: dict[str, int] = {}
    for item in metadata["include"]:
        if "color" in item:
            wanted[item["class"]] = max(item["count"], wanted.get(item["class"], 0))
    surest = sorted(range(len(detections)), key=lambda index: -detections[index].confidence)
    return [
        index
        for kind, count in wanted.items()
        for index in [index for index in surest if detections[index].kind == kind][:count]
    ]
