"""Stable Diffusion 3 and 3.5: conventions of diffusers' StableDiffusion3Pipeline."""

from __future__ import annotations

from typing import Final

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from rollout.adapter import prepare
from rollout.families import Schedule, Tensors, Velocity
from rollout.settings import ModelSettings, RolloutSettings


class SD3:
    """Two or three text encoders, a joint-attention transformer, a scaled and shifted autoencoder."""

    lora_targets: Final = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip

    def __init__(
        self, model: ModelSettings, rollout: RolloutSettings, *, device: str, seed: int, whole: bool
    ) -> None:
        """Load the pipeline, or only its transformer and scheduler when nothing is decoded or encoded."""
        self.rollout = rollout
        self.device = torch.device(device)
        self.dtype = getattr(torch, model.dtype)
        if whole:
            absent = _absent(model.path)
            pipeline = StableDiffusion3Pipeline.from_pretrained(model.path, dtype=self.dtype, **absent)
            pipeline.set_progress_bar_config(disable=True)
            self.pipeline = pipeline.to(self.device)
            self.pipeline.vae.float()  # half precision shows in flat areas, and decoding is cheap
            transformer, self.scheduler = self.pipeline.transformer, self.pipeline.scheduler
        else:
            transformer = SD3Transformer2DModel.from_pretrained(
                model.path, subfolder="transformer", dtype=self.dtype
            )
            self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
                model.path, subfolder="scheduler"
            )
        self.transformer = prepare(transformer.to(self.device), model, self.lora_targets, seed)

    def schedule(self, steps: int) -> Schedule:
        """Sigmas and timesteps as the pipeline's scheduler sets them (its shift included)."""
        self.scheduler.set_timesteps(steps)
        return Schedule(self.scheduler.sigmas.float().cpu(), self.scheduler.timesteps.float().cpu())

    @torch.no_grad()
    def encode(self, text: str) -> Tensors:
        """Joint-attention states (L, D) and pooled embedding (P,); with guidance also the empty prompt's."""
        guided = self.rollout.guidance > 1
        hidden, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            text, None, None,
            device=self.device,
            do_classifier_free_guidance=guided,
            max_sequence_length=self.rollout.text_tokens,
        )  # fmt: skip
        found = {"hidden": hidden[0], "pooled": pooled[0]}
        if guided:
            found |= {"negative_hidden": negative[0], "negative_pooled": negative_pooled[0]}
        return found

    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one latent."""
        factor = self.pipeline.vae_scale_factor
        channels = int(self.transformer.config.in_channels)
        return channels, self.rollout.height // factor, self.rollout.width // factor

    def velocity(self, model: Velocity, x: Tensor, timestep: Tensor, conditioning: Tensors) -> Tensor:
        """Velocity (N, C, H, W) float32; with guidance both branches run as one batch."""
        hidden, pooled = conditioning["hidden"], conditioning["pooled"]
        guided = self.rollout.guidance > 1
        if guided:
            hidden = torch.cat([conditioning["negative_hidden"], hidden])
            pooled = torch.cat([conditioning["negative_pooled"], pooled])
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
        v: Tensor = model(
            hidden_states=x.to(self.dtype),
            timestep=timestep,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            return_dict=False,
        )[0].float()
        if not guided:
            return v
        without, with_prompt = v.chunk(2)
        return without + self.rollout.guidance * (with_prompt - without)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents (N, C, H, W) to images (N, H, W, 3) uint8."""
        vae = self.pipeline.vae
        pixels: Tensor = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _absent(path: str) -> dict[str, None]:
    """Components that were saved as missing (T5, usually); diffusers wants to be told so again."""
    index = StableDiffusion3Pipeline.load_config(path)
    return {name: None for name, entry in index.items() if entry == [None, None]}
