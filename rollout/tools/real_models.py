"""The published configurations of models: their shapes, without their weights.

Parameters counted from them agree with `rollout.families.published`. Text encoders are not among them: where
weights are drawn at random, thin ones of the same width stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from rollout.tiny.vocabulary import build_tokenizer
from rollout.tools import tiny_text

TOKENS: Final = 77
"""Length of a prompt in CLIP."""
Text = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class RealModel:
    """A model on the hub: its pipeline's class, and builders of its components."""

    hub: str
    pipeline: str
    transformer: Callable[[], Any]
    vae: Callable[[], Any]
    text: Text
    scheduler: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the pipeline."""

    def parts(self) -> dict[str, Any]:
        """Build what has a published configuration."""
        return {
            "transformer": self.transformer(),
            "vae": self.vae(),
            "scheduler": FlowMatchEulerDiscreteScheduler(**self.scheduler),
        }

    def build(self) -> Any:
        """Build the pipeline with thin text encoders, under torch's default device and precision."""
        made = getattr(diffusers, self.pipeline)
        return made(**self.parts(), **self.text(), **self.extra)


def _image_vae(scale: float, shift: float) -> Any:
    """Build the autoencoder of SD3, FLUX.1 and Z-Image, which scale and shift latents in their own ways."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
        scaling_factor=scale, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


_flux_vae = partial(_image_vae, 0.3611, 0.1159)


def _sd3(hub: str, layers: int, *, width: int, positions: int, dual: int = 0, norm: str | None) -> RealModel:
    """Describe an SD3: as many heads as layers, ``dual`` layers with a second attention."""
    transformer = partial(
        diffusers.SD3Transformer2DModel, sample_size=128, patch_size=2, in_channels=16, out_channels=16,
        attention_head_dim=64, joint_attention_dim=4096, pooled_projection_dim=2048, qk_norm=norm,
        num_layers=layers, num_attention_heads=layers, caption_projection_dim=width,
        pos_embed_max_size=positions, dual_attention_layers=tuple(range(dual)),
    )  # fmt: skip
    return RealModel(
        hub, "StableDiffusion3Pipeline", transformer, partial(_image_vae, 1.5305, 0.0609), _two_clips,
        scheduler={"shift": 3.0}, extra={"text_encoder_3": None, "tokenizer_3": None},
    )  # fmt: skip


def _two_clips() -> dict[str, Any]:
    tokenizer = build_tokenizer(TOKENS)
    return {
        "text_encoder": _clip(768, 12, tokenizer), "tokenizer": tokenizer,
        "text_encoder_2": _clip(1280, 20, tokenizer), "tokenizer_2": tokenizer,
    }  # fmt: skip


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


def _sana_vae() -> Any:
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    scales, channels = ((), (), (), (5,), (5,), (5,)), (128, 256, 512, 512, 1024, 1024)
    return diffusers.AutoencoderDC(
        latent_channels=32, attention_head_dim=32, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=channels, decoder_block_out_channels=channels,
        encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3), decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip


def _wan_5b_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=160, decoder_base_dim=256, z_dim=48, in_channels=12, out_channels=12, is_residual=True,
        patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    )  # fmt: skip


def _flux(hub: str, *, guidance: bool) -> RealModel:
    return RealModel(
        hub, "FluxPipeline", partial(diffusers.FluxTransformer2DModel, guidance_embeds=guidance), _flux_vae,
        lambda: {**tiny_text.clip(width=768, length=77), **tiny_text.t5("_2", width=4096)},
        scheduler={"shift": 3.0, "use_dynamic_shifting": True},
        extra={"image_encoder": None, "feature_extractor": None},
    )  # fmt: skip


def _flux2(hub: str, pipeline: str, text: Text, extra: dict[str, Any], **config: Any) -> RealModel:
    return RealModel(
        hub, pipeline, partial(diffusers.Flux2Transformer2DModel, **config), diffusers.AutoencoderKLFlux2,
        text, scheduler={"shift": 3.0, "use_dynamic_shifting": True}, extra=extra,
    )  # fmt: skip


def _klein(hub: str, width: int, *, distilled: bool = True, **config: Any) -> RealModel:
    return _flux2(
        hub, "Flux2KleinPipeline", partial(tiny_text.qwen3, layers=27, causal=True, width=width),
        {"is_distilled": distilled}, joint_attention_dim=3 * width, guidance_embeds=False, **config,
    )  # fmt: skip


def _wan(hub: str, vae: Callable[[], Any], extra: dict[str, Any] | None = None, **config: Any) -> RealModel:
    return RealModel(
        hub, "WanPipeline", partial(diffusers.WanTransformer3DModel, cross_attn_norm=True, **config), vae,
        partial(tiny_text.umt5, width=4096), scheduler={"shift": 5.0},
        extra={"transformer_2": None, **(extra or {})},
    )  # fmt: skip


REAL: Final = {
    "sd3-medium": _sd3(
        "stabilityai/stable-diffusion-3-medium-diffusers", 24, width=1536, positions=192, norm=None
    ),
    "sd35-medium": _sd3(
        "stabilityai/stable-diffusion-3.5-medium", 24, width=1536, positions=384, dual=13, norm="rms_norm"
    ),
    "sd35-large": _sd3(
        "stabilityai/stable-diffusion-3.5-large", 38, width=2432, positions=192, norm="rms_norm"
    ),
    "flux1-dev": _flux("black-forest-labs/FLUX.1-dev", guidance=True),
    "flux1-schnell": _flux("black-forest-labs/FLUX.1-schnell", guidance=False),
    "flux2-dev": _flux2(
        "black-forest-labs/FLUX.2-dev", "Flux2Pipeline",
        partial(tiny_text.mistral, layers=30, width=5120), {},
    ),
    "flux2-klein-4b": _klein(
        "black-forest-labs/FLUX.2-klein-4B", 2560, num_layers=5, num_single_layers=20, num_attention_heads=24
    ),
    "flux2-klein-base-4b": _klein(
        "black-forest-labs/FLUX.2-klein-base-4B", 2560, distilled=False, num_layers=5, num_single_layers=20,
        num_attention_heads=24,
    ),
    "flux2-klein-9b": _klein(
        "black-forest-labs/FLUX.2-klein-9B", 4096, num_layers=8, num_single_layers=24, num_attention_heads=32
    ),
    "qwen-image": RealModel(
        "Qwen/Qwen-Image", "QwenImagePipeline", diffusers.QwenImageTransformer2DModel,
        diffusers.AutoencoderKLQwenImage, partial(tiny_text.qwen_vl, width=3584),
        scheduler={
            "use_dynamic_shifting": True, "shift_terminal": 0.02, "base_shift": 0.5, "max_shift": 0.9,
            "max_image_seq_len": 8192,
        },
    ),
    "z-image": RealModel(
        "Tongyi-MAI/Z-Image-Turbo", "ZImagePipeline", diffusers.ZImageTransformer2DModel, _flux_vae,
        partial(tiny_text.qwen3, layers=2, causal=False, width=2560), scheduler={"shift": 3.0},
    ),
    "sana-1.6b": RealModel(
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", "SanaPipeline",
        diffusers.SanaTransformer2DModel, _sana_vae, partial(tiny_text.gemma, width=2304),
        scheduler={"shift": 3.0},
    ),
    "wan21-1.3b": _wan(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", diffusers.AutoencoderKLWan, num_attention_heads=12,
        ffn_dim=8960, num_layers=30,
    ),
    "wan21-14b": _wan("Wan-AI/Wan2.1-T2V-14B-Diffusers", diffusers.AutoencoderKLWan),
    "wan22-5b": _wan(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers", _wan_5b_vae, {"expand_timesteps": True}, num_attention_heads=24,
        ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48,
    ),
}  # fmt: skip
"""Models by short names."""
