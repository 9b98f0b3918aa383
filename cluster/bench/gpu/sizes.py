"""The sizes at which the suite measures a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from cluster.bench.gpu.check import Setup
from cluster.bench.subject import Subject, requests
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.random_models import NAMES, save_random

DTYPE: Final = {"cuda": "bfloat16", "cpu": "float32"}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes at which a model is measured, as settings of the sampler."""

    rollout: dict[str, Any]
    lora_rank: int = 32
    turns: int = 1
    """Whole steps in turns with the plain loop, which takes long."""


SHAPES: Final = {
    "tiny": Shape({"width": 32, "height": 32, "steps": 3, "batch": 4, "text_tokens": 0}, turns=2),
    "sd35-medium": Shape({"batch": 16}),
    "sana-1.6b": Shape({"batch": 16}),
    "qwen-image": Shape({"batch": 2}),
    "flux2-dev": Shape({"batch": 2}),
    "wan21-1.3b": Shape({"width": 416, "height": 240, "frames": 33, "batch": 2}),
    "wan21-14b": Shape({"width": 416, "height": 240, "frames": 33, "batch": 1}),
    "wan22-5b": Shape({"width": 416, "height": 224, "frames": 33, "batch": 1}),
}
OTHER: Final = Shape({"batch": 4})
"""The sizes for other models, and for a pipeline of the user's own."""


def subject_of(setup: Setup) -> Subject:
    """Describe the model of a check, with an adapter, at its sizes; a random one is written if it is not."""
    shape = SHAPES.get(setup.model, OTHER)
    path = str(written(setup)) if setup.model in NAMES else setup.model
    model = ModelSettings(path=path, dtype=DTYPE[setup.device], lora_rank=shape.lora_rank)
    rollout = RolloutSettings.model_validate(
        {"storage": "bfloat16", "gpus": setup.gpus, "threads": torch.get_num_threads(), **shape.rollout}
    )
    return Subject(model, rollout, setup.device)


def guided_pass(one: Subject, policy: Any) -> Callable[[], Any]:
    """Build a forward pass of a batch, with both branches of the guidance."""
    (asked,) = requests(one, 1)
    conditioning = {
        name: torch.stack([value] * one.rollout.batch)
        for name, value in policy.encode(asked.prompt.text).items()
    }
    x = torch.randn(one.rollout.batch, *policy.latent_shape(), device=one.device)
    timestep = torch.full((one.rollout.batch,), 500.0, device=one.device)
    return torch.no_grad()(lambda: policy.velocity(policy.transformer, x, timestep, conditioning))


def written(setup: Setup) -> Path:
    """Return the folder of a random model, and write it unless it is there."""
    folder = setup.folder / setup.model
    if not folder.is_dir():
        save_random(setup.model, folder, DTYPE[setup.device])
    return folder
