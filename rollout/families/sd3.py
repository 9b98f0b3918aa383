"""Stable Diffusion 3 and 3.5, by the conventions of diffusers' StableDiffusion3Pipeline."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rollout.families.diffusers_policy import DiffusersPolicy
from rollout.families.prompt_lengths import TextReader, clip_reader, plain
from rollout.families.registry import Tensors, Velocity


class SD3(DiffusersPolicy):
    """SD3 and SD3.5: two or three text encoders, joint attention, a scaled and shifted autoencoder."""

    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip

    def cell(self) -> int:
        """Return the pixels per patch of the transformer; the autoencoder halves the image between blocks."""
        halvings = len(self.vae_config["block_out_channels"]) - 1
        return int(self.transformer.config.patch_size * 2**halvings)

    def positions(self) -> int | None:
        """Return the side of the square table of positions, from whose middle an image's are taken."""
        return int(self.transformer.config.pos_embed_max_size)

    def latent_shape(self) -> tuple[int, ...]:
        """Return (channels, height, width) of one image's latents."""
        patch = self.transformer.config.patch_size
        return self.transformer.config.in_channels, self.high * patch, self.wide * patch

    def spacing(self, steps: int) -> dict[str, Any]:
        """Return the number of steps, and the shift by the image's size if the scheduler wants one."""
        found = super().spacing(steps)
        return found | (
            {"mu": self.shift(most=1.16)} if self.scheduler.config.get("use_dynamic_shifting") else {}
        )

    def embed(self, text: str, *, negative: bool = False) -> Tensors:
        """Encode a prompt to joint-attention states (L, D) and a pooled embedding (P,)."""
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            text, None, None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
        )  # fmt: skip
        return {"hidden": hidden[0], "pooled": pooled[0]}

    def text_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of CLIP's states and T5's, and of the pooled embedding."""
        config = self.transformer.config
        states = clip_tokens + self.text_tokens, config.joint_attention_dim
        return {"hidden": states, "pooled": (config.pooled_projection_dim,)}

    def text_readers(self, pipeline: Any) -> list[TextReader]:
        """Describe CLIP, once for two equal tokenizers, and T5 if the model has and uses it."""
        readers = [clip_reader(pipeline.tokenizer)]
        if pipeline.tokenizer_3 is not None and self.text_tokens:
            readers.append(TextReader("T5", self.text_tokens, plain(pipeline.tokenizer_3)))
        return readers

    def predict(self, model: Velocity, x: Tensor, timestep: Tensor, text: Tensors) -> Tensor:
        """Predict with the transformer, with the timestep in [0, 1000] as input."""
        return model(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=text["hidden"],
            pooled_projections=text["pooled"],
            return_dict=False,
        )[0]
