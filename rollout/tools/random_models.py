"""Pipelines of real sizes with random weights, for benchmarks on machines without access to a model hub.

Transformer, autoencoder and scheduler have their published configurations. Text encoders have the real
widths but are thin, and SD3's T5 is left out, which diffusers replaces by zeros of its shape: the transformer
sees the same number of tokens, without the time to create and load encoders that a benchmark hardly uses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from rollout.tiny.build import LATENT_CHANNELS, TEXT_WIDTH, World, assemble, build_world
from rollout.tools import tiny_text
from rollout.tools.real_models import REAL, TOKENS, RealModel

TINY_SIZES: Final = {"tiny": 32, "tiny-sd35": 64}
"""Models for CPUs, with the pixels on a side for which they are made.

``tiny`` is the bundled models' architecture with half the layers. ``tiny-sd35`` also has what SD3.5-medium
has: three text encoders, prompts of 205 tokens, and a second attention in the first half of its blocks.
"""

NAMES: Final = (*TINY_SIZES, *REAL)
"""Models that can be built."""

PUBLISHED: Final = {model.hub: name for name, model in REAL.items()}
"""Names of the published models on the hub, with the names of their random counterparts."""

TINY: Final = World(size=(32, 32), tokens=14, layers=2)
"""0.64 M parameters, images of 32 pixels."""


def save_random(name: str, folder: Path, dtype: str, seed: int = 0) -> None:
    """Write a random pipeline, one of `NAMES`, as a folder for ``from_pretrained``."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipeline = _TINY[name](seed) if name in _TINY else _build(REAL[name], seed, dtype)
    _stir(pipeline.transformer, seed)
    pipeline.save_pretrained(folder)


def save_configs(name: str, folder: Path) -> None:
    """Write only the configurations of a model, a key of `REAL`: they determine its shapes."""
    real = REAL[name]
    with torch.device("meta"):
        parts = real.parts()
    for part, module in parts.items():
        module.save_config(folder / part)
    index: dict[str, Any] = {"_class_name": real.pipeline}
    index |= {part: ["diffusers", type(module).__name__] for part, module in parts.items()}
    for key, value in real.extra.items():
        index[key] = [None, None] if value is None else value  # a component that this model lacks
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


@torch.no_grad()
def _stir(transformer: torch.nn.Module, seed: int) -> None:
    """Randomise the zero parameters: with its last layer and gates at zero, a new transformer predicts 0."""
    torch.manual_seed(seed)
    for parameter in transformer.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


def _tiny(seed: int) -> Any:
    pipeline = build_world(TINY, seed)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    return pipeline


def _tiny_sd35(seed: int) -> Any:
    """Build 2.2 M parameters in six blocks of width 96."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=6,
        attention_head_dim=32, num_attention_heads=3, joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=96, pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=8,
        qk_norm="rms_norm", dual_attention_layers=(0, 1, 2),
    )  # fmt: skip
    return assemble(transformer, TOKENS, shift=3.0, **tiny_text.t5("_3", width=2 * TEXT_WIDTH))


_TINY: Final = {"tiny": _tiny, "tiny-sd35": _tiny_sd35}


def _build(model: RealModel, seed: int, dtype: str) -> Any:
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        return model.build()
    finally:
        torch.set_default_dtype(before)
