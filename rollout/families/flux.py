"""FLUX.1, by the conventions of diffusers' FluxPipeline (dev, with distilled guidance, and schnell)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from rollout.families.diffusers_policy import DiffusersPolicy, coordinates
from rollout.families.prompt_lengths import TextReader, clip_reader, plain
from rollout.families.registry import Tensors, Velocity


class Flux(DiffusersPolicy):
    """FLUX.1: CLIP's pooled and T5's token states; the transformer sees 2 x 2 latents as one token."""

    text_default = 512
    guided = False  # the guidance is distilled: an input of the transformer, not a second pass
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip

    def cell(self) -> int:
        """Return the pixels per side of two latents; each block of the autoencoder but one halves it."""
        return int(2 ** len(self.vae_config["block_out_channels"]))

    def latent_shape(self) -> tuple[int, ...]:
        """Return (channels, height, width), not packed, as the pipeline draws its noise."""
        return self.transformer.config.in_channels // 4, 2 * self.high, 2 * self.wide

    def spacing(self, steps: int) -> dict[str, Any]:
        """Return noise levels shifted by the image's size."""
        return self.shifted_spacing(steps)

    def embed(self, text: str, *, negative: bool = False) -> Tensors:
        """Encode a prompt to T5's states (L, D) and CLIP's pooled embedding (P,)."""
        hidden, pooled, _ = self.pipeline.encode_prompt(
            text, device=self.device, max_sequence_length=self.text_tokens
        )
        return {"hidden": hidden[0], "pooled": pooled[0]}

    def text_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of states and pooled embedding."""
        pooled = (self.transformer.config.pooled_projection_dim,)
        return {**super().text_shapes(clip_tokens), "pooled": pooled}

    def text_readers(self, pipeline: Any) -> list[TextReader]:
        """Describe CLIP, of which only the pooled embedding is used, and T5."""
        t5 = TextReader("T5", self.text_tokens, plain(pipeline.tokenizer_2))
        return [clip_reader(pipeline.tokenizer), t5]

    def predict(self, model: Velocity, x: Tensor, timestep: Tensor, text: Tensors) -> Tensor:
        """Predict on packed latents, with the noise level in [0, 1] and the guidance as inputs."""
        distilled = self.transformer.config.guidance_embeds
        v: Tensor = model(
            hidden_states=pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
            timestep=timestep / 1000,
            guidance=torch.full_like(timestep, self.rollout.guidance) if distilled else None,
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["hidden"],
            txt_ids=torch.zeros(text["hidden"].shape[1], 3, dtype=torch.long, device=x.device),
            img_ids=coordinates(1, self.high, self.wide, device=x.device),
            return_dict=False,
        )[0]
        return pixel_shuffle(v.transpose(1, 2).unflatten(2, (self.high, self.wide)), 2)
