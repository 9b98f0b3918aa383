"""The architecture of the bundled models: a small StableDiffusion3Pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from rollout.tiny.vocabulary import build_tokenizer

TEXT_WIDTH: Final = 48
LATENT_CHANNELS: Final = 8


@dataclass(frozen=True, slots=True)
class World:
    """The sizes that differ between models: image in pixels (width, height), prompt length, transformer."""

    size: tuple[int, int]
    tokens: int
    layers: int
    width: int = 96


WORLDS: Final = {
    "shapes": World(size=(32, 32), tokens=14, layers=4),
    "words": World(size=(48, 16), tokens=12, layers=4),
}


def build_vae() -> AutoencoderKL:
    """Build a convolutional autoencoder that shrinks images four times per side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
        shift_factor=0.0,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Build a two-layer CLIP text encoder; SD3 uses its penultimate layer and its pooled projection."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_transformer(world: World) -> SD3Transformer2DModel:
    """Build the MMDiT, with one token per 8 x 8 pixels."""
    return SD3Transformer2DModel(
        sample_size=max(world.size) // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=world.layers,
        attention_head_dim=32,
        num_attention_heads=world.width // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=world.width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=max(world.size) // 8,
        qk_norm="rms_norm",
    )


def build_pipeline(task: str, seed: int) -> StableDiffusion3Pipeline:
    """Build an untrained pipeline for a task ("shapes" or "words"), its weights drawn from the seed."""
    return build_world(WORLDS[task], seed)


def build_world(world: World, seed: int) -> StableDiffusion3Pipeline:
    """Build an untrained pipeline of any size."""
    torch.manual_seed(seed)
    return assemble(build_transformer(world), world.tokens, shift=1.0)


def assemble(
    transformer: SD3Transformer2DModel,
    tokens: int,
    *,
    shift: float,
    text_encoder_3: Any = None,
    tokenizer_3: Any = None,
) -> StableDiffusion3Pipeline:
    """Build the pipeline of a transformer, with an autoencoder and two encoders of prompts of ``tokens``."""
    tokenizer = build_tokenizer(tokens)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
