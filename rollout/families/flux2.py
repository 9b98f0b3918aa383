"""FLUX.2, by the conventions of diffusers' Flux2Pipeline (dev) and Flux2KleinPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from rollout.families.diffusers_policy import DiffusersPolicy, coordinates
from rollout.families.prompt_lengths import TextReader, chat_reader
from rollout.families.registry import Tensors, Velocity


class Flux2(DiffusersPolicy):
    """FLUX.2: states of three layers of a language model; positions in time, row, column and text."""

    text_default = 512

    @property
    def lora_targets(self) -> Sequence[str]:  # type: ignore[override]
        """Attention projections; outputs of single blocks by full name, which is a list in double blocks."""
        singles = range(self.transformer.config.num_single_layers)
        return (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
            "attn.to_qkv_mlp_proj", *(f"single_transformer_blocks.{i}.attn.to_out" for i in singles),
        )  # fmt: skip

    @property
    def guided(self) -> bool:
        """True for the undistilled klein with guidance; dev's and distilled klein's guidance is an input."""
        undistilled = self.index["_class_name"] == "Flux2KleinPipeline" and not self.index["is_distilled"]
        return undistilled and self.rollout.guidance > 1

    def cell(self) -> int:
        """Return the pixels per side of two of the autoencoder's latents."""
        return int(2 ** len(self.vae_config["block_out_channels"]))

    def latent_shape(self) -> tuple[int, ...]:
        """Return (channels, height, width) of tokens: this pipeline draws its noise packed."""
        return self.transformer.config.in_channels, self.high, self.wide

    def spacing(self, steps: int) -> dict[str, Any]:
        """Return noise levels shifted by a fit over image sizes and numbers of steps."""
        return self.shifted_spacing(steps, compute_empirical_mu(self.high * self.wide, steps))

    def embed(self, text: str, *, negative: bool = False) -> Tensors:
        """Encode a prompt to states (L, D) of a chat of fixed length, with padding that the model sees."""
        hidden, _ = self.pipeline.encode_prompt(
            text, device=self.device, max_sequence_length=self.text_tokens
        )
        return {"hidden": hidden[0]}

    def text_readers(self, pipeline: Any) -> list[TextReader]:
        """Describe the language model on a chat: dev's with a system message, klein's without thinking."""
        length = self.text_tokens
        if self.index["_class_name"] == "Flux2KleinPipeline":
            return [chat_reader("Qwen3", pipeline.tokenizer, length, enable_thinking=False)]

        def chats(texts: Sequence[str]) -> list[int]:
            written = format_input(list(texts), system_message=pipeline.system_message)
            read = pipeline.tokenizer.apply_chat_template
            return [len(read([chat], tokenize=True, return_dict=True)["input_ids"][0]) for chat in written]

        return [TextReader("Mistral", length, chats)]

    def predict(self, model: Velocity, x: Tensor, timestep: Tensor, text: Tensors) -> Tensor:
        """Predict on tokens, with the noise level in [0, 1] and, where distilled, the guidance as inputs."""
        distilled = self.transformer.config.guidance_embeds
        v: Tensor = model(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=timestep / 1000,
            guidance=torch.full_like(timestep, self.rollout.guidance) if distilled else None,
            encoder_hidden_states=text["hidden"],
            txt_ids=coordinates(1, 1, 1, text["hidden"].shape[1], device=x.device)[None],
            img_ids=coordinates(1, self.high, self.wide, 1, device=x.device)[None],
            return_dict=False,
        )[0]
        return v.transpose(1, 2).reshape(x.shape)

    def pixels(self, latents: Tensor) -> Tensor:
        """Invert the autoencoder's batch norm, unpack every token's 2 x 2 latents, and decode."""
        vae = self.pipeline.vae
        mean, variance = (s.view(1, -1, 1, 1) for s in (vae.bn.running_mean, vae.bn.running_var))
        latents = latents * (variance + vae.config.batch_norm_eps).sqrt() + mean
        decoded: Tensor = vae.decode(pixel_shuffle(latents, 2)).sample
        return decoded
