"""The cost of scoring an image with the built-in rewards, for plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rewards.settings import RewardSettings
from rollout.settings import RolloutSettings

CORE: Final = 6e10
"""FLOP/s of a CPU core in float32, as measured on a Xeon with models of this size."""
SIDE: Final = 512
"""Pixels on a side of the images that costs by the second were measured with; they grow with the area."""


@dataclass(frozen=True, slots=True)
class RewardCost:
    """Floating-point operations per image, or seconds of a CPU core for an image of `SIDE`.

    ``memory`` are the bytes of its models, and of a batch of images in them.
    """

    flops: float = 0.0
    seconds: float = 0.0
    memory: float = 0.0


VIT_L: Final = RewardCost(flops=1.6e11, memory=2.2e9)
VIT_H: Final = RewardCost(flops=3.4e11, memory=4.5e9)
COSTS: Final = {
    "clipscore": VIT_L,
    "aesthetic": VIT_L,
    "pickscore": VIT_H,
    "hpsv2": VIT_H,
    "geneval": RewardCost(
        flops=8e11, memory=6e9
    ),  # Mask2Former Swin-S at 800 pixels, and CLIP ViT-L for a colour
    "ocr": RewardCost(seconds=0.12),
    "jpeg": RewardCost(seconds=0.005),
    "shapes": RewardCost(seconds=0.001),
}
"""Operations are twice a model's parameters times its tokens; seconds were measured."""
WHOLE_IMAGE: Final = RewardCost(seconds=0.38)
"""The reward ``ocr`` where it also has to find the text."""


def reward_memory(reward: RewardSettings) -> dict[str, float]:
    """Return the bytes of a replica; empty if unknown."""
    cost = COSTS.get(reward.target)
    return {"models": cost.memory} if cost and cost.memory else {}


def seconds_per_image(reward: RewardSettings, rollout: RolloutSettings, flops: float) -> float | None:
    """Estimate the seconds of a replica for an image; ``flops`` is the speed of a GPU. None if unknown."""
    cost = COSTS.get(reward.target)
    if cost is None:
        return None
    if reward.target == "ocr" and reward.options.get("mode") == "full":
        cost = WHOLE_IMAGE
    if cost.flops:
        return cost.flops / (flops if reward.gpus else CORE)
    return cost.seconds * rollout.width * rollout.height / SIDE**2
