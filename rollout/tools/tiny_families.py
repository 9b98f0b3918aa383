"""Tiny random checkpoints of every family in their real formats, with settings that fit them.

They show that a family works on a device: `cluster.bench.gpu` and the tests use them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from rollout.settings import RolloutSettings
from rollout.tools import tiny_text


@dataclass(frozen=True, slots=True)
class Tiny:
    """A builder of a pipeline, and the settings that its size requires."""

    build: Callable[[], diffusers.DiffusionPipeline]
    rollout: dict[str, Any] = field(default_factory=dict)

    def settings(self, **changes: Any) -> RolloutSettings:
        """Return settings with ``changes``; never square, so that mixing up height and width is noticed."""
        values = {"width": 24, "height": 16, "steps": 4, "eval_steps": 4, "guidance": 3.0, "text_tokens": 48,
                  "gpus": 0, "batch": 3}  # fmt: skip
        return RolloutSettings(**{**values, **self.rollout, **changes})

    def save(self, folder: Path) -> Path:
        """Write the pipeline, always with the same weights, and return its folder."""
        torch.manual_seed(5)
        pipeline = self.build()
        stir(pipeline.transformer)
        pipeline.save_pretrained(folder)
        return folder


@torch.no_grad()
def stir(module: nn.Module) -> None:
    """Add noise to every weight: fresh models ignore much of their input."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.4 * parameter.shape[-1] ** -0.5)


def dynamic(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    """Build a scheduler whose shift depends on the number of image tokens."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **config)


def image_vae(**config: Any) -> diffusers.AutoencoderKL:
    """Build an autoencoder that halves the image once."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=0.8,
        shift_factor=0.1,
        **config,
    )


def sd3() -> diffusers.StableDiffusion3Pipeline:
    """Build the bundled architecture with random weights."""
    from rollout.tiny.build import build_pipeline

    pipeline = build_pipeline("shapes", seed=3)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    return pipeline


def flux() -> diffusers.FluxPipeline:
    """Build a FLUX.1."""
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        ),
        scheduler=dynamic(shift=3.0),
        vae=image_vae(),
        **tiny_text.clip(),
        **tiny_text.t5("_2"),
        image_encoder=None,
        feature_extractor=None,
    )  # fmt: skip


def flux2(**text: Any) -> dict[str, Any]:
    """Build the common components of FLUX.2, given its text encoder."""
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=text.pop("guidance_embeds"),
    )  # fmt: skip
    return {"transformer": transformer, "vae": vae, "scheduler": dynamic(), **text}


def flux2_dev() -> diffusers.Flux2Pipeline:
    """Build a FLUX.2-dev."""
    return diffusers.Flux2Pipeline(**flux2(guidance_embeds=True, **tiny_text.mistral(layers=30)))


def flux2_klein() -> diffusers.Flux2KleinPipeline:
    """Build a FLUX.2-klein."""
    text = tiny_text.qwen3(layers=27, causal=True)
    return diffusers.Flux2KleinPipeline(**flux2(guidance_embeds=False, **text), is_distilled=False)


def qwen_image() -> diffusers.QwenImagePipeline:
    """Build a Qwen-Image."""
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        ),
        scheduler=dynamic(shift_terminal=0.02, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.2, 1.0, 0.5],
        ),
        **tiny_text.qwen_vl(),
    )  # fmt: skip


def z_image() -> diffusers.ZImagePipeline:
    """Build a Z-Image."""
    return diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        **tiny_text.qwen3(layers=2, causal=False),
    )  # fmt: skip


def sana() -> diffusers.SanaPipeline:
    """Build a SANA."""
    return diffusers.SanaPipeline(
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
            caption_channels=16, sample_size=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1), downsample_block_type="conv", upsample_block_type="interpolate",
            decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41,
        ),
        **tiny_text.gemma(),
    )  # fmt: skip


def wan(**config: Any) -> diffusers.WanPipeline:
    """Build a Wan 2.1, or with ``expand_timesteps`` a Wan 2.2 of 5 B."""
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
            freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.2, 1.0, 0.5],
        ),
        **tiny_text.umt5(),
        transformer_2=None,
        **config,
    )  # fmt: skip


VIDEO: Final = {"width": 48, "height": 32, "frames": 9}

TINY: Final = {
    "sd3": Tiny(sd3, {"text_tokens": 0}),
    "flux": Tiny(flux),
    "qwen_image": Tiny(qwen_image, {"text_tokens": 300}),
    "sana": Tiny(sana, {"width": 64, "height": 32}),
    "z_image": Tiny(z_image, {"text_tokens": 80}),
    "flux2_dev": Tiny(flux2_dev, {"text_tokens": 256}),
    "flux2_klein": Tiny(flux2_klein, {"text_tokens": 80}),
    "wan": Tiny(wan, VIDEO),
    "wan_5b": Tiny(lambda: wan(expand_timesteps=True), VIDEO),
}
"""A checkpoint for each pipeline that `rollout.families.registry.FAMILIES` names, and its variants."""
