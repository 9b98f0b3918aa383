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
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from rollout.tiny.build import World, build_world
from rollout.tiny.vocabulary import build_tokenizer
from rollout.tools.real_models import REAL

SD35: Final[dict[str, Any]] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
}  # fmt: skip

TRANSFORMERS: Final[dict[str, dict[str, Any]]] = {
    # transformer/config.json of stabilityai/stable-diffusion-3-medium-diffusers
    "sd3-medium": {
        **SD35, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
        "pos_embed_max_size": 192, "dual_attention_layers": (), "qk_norm": None,
    },
    # transformer/config.json of stabilityai/stable-diffusion-3.5-medium
    "sd35-medium": {
        **SD35, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
        "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
    },
    # transformer/config.json of stabilityai/stable-diffusion-3.5-large
    "sd35-large": {
        **SD35, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
        "pos_embed_max_size": 192, "dual_attention_layers": (),
    },
}  # fmt: skip
"""The configurations of Stable Diffusion 3 and 3.5, as far as they differ from the family's defaults."""

NAMES: Final = ("tiny", *TRANSFORMERS, *REAL)
"""Models that can be built; ``tiny`` is the bundled models' architecture with half the layers, for CPUs."""

PUBLISHED: Final = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd35-large",
    **{model.hub: name for name, model in REAL.items()},
}
"""Names of the published models on the hub, with the names of their random counterparts."""

TINY: Final = World(size=(32, 32), tokens=14, layers=2)
"""0.64 M parameters, images of 32 pixels."""

TOKENS: Final = 77
"""Length of a prompt in CLIP."""


def save_random(name: str, folder: Path, dtype: str, seed: int = 0) -> None:
    """Write a random pipeline, one of `NAMES`, as a folder for ``from_pretrained``."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipeline = build_world(TINY, seed) if name == "tiny" else _build(name, seed, dtype)
    if name not in REAL:
        pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    _stir(pipeline.transformer, seed)
    pipeline.save_pretrained(folder)


def save_configs(name: str, folder: Path) -> None:
    """Write only the configurations of a model, one of `NAMES` except ``tiny``: they determine its shapes."""
    real = REAL.get(name)
    with torch.device("meta"):
        transformer = real.transformer() if real else SD3Transformer2DModel(**TRANSFORMERS[name])
        parts = {
            "transformer": transformer,
            "vae": real.vae() if real else _vae(),
            "scheduler": FlowMatchEulerDiscreteScheduler(**(real.scheduler if real else {"shift": 3.0})),
        }
    for part, module in parts.items():
        module.save_config(folder / part)
    index: dict[str, Any] = {"_class_name": real.pipeline if real else "StableDiffusion3Pipeline"}
    index |= {part: ["diffusers", type(module).__name__] for part, module in parts.items()}
    for key, value in real.extra.items() if real else ():
        index[key] = [None, None] if value is None else value  # a component that this model lacks
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


@torch.no_grad()
def _stir(transformer: torch.nn.Module, seed: int) -> None:
    """Randomise the zero parameters: with its last layer and gates at zero, a new transformer predicts 0."""
    torch.manual_seed(seed)
    for parameter in transformer.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)


def _build(name: str, seed: int, dtype: str) -> Any:
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        if name in REAL:
            return REAL[name].build()
        tokenizer = build_tokenizer(TOKENS)
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**TRANSFORMERS[name]),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_clip(768, 12, tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=_clip(1280, 20, tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    finally:
        torch.set_default_dtype(before)


def _vae() -> AutoencoderKL:
    """Build the autoencoder of vae/config.json of stabilityai/stable-diffusion-3.5-medium."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(width: int, heads: int, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Build a text encoder of the width of CLIP ViT-L (768) or bigG (1280), two layers deep."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=heads,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
