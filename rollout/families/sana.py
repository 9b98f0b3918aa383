"""SANA, by the conventions of diffusers' SanaPipeline."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Final

from diffusers import SanaPipeline
from torch import Tensor

from rollout.families.diffusers_policy import DiffusersPolicy
from rollout.families.prompt_lengths import TextReader, plain
from rollout.families.registry import Tensors, Velocity
from rollout.settings import RolloutSettings

INSTRUCTION: Final = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""Instruction that the pipeline prepends to every prompt: a request to Gemma to enrich it."""


class Sana(DiffusersPolicy):
    """SANA: Gemma's states with their mask, linear attention, and an autoencoder that shrinks 32 times."""

    text_width = "caption_channels"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_limit = text_default = 300

    @staticmethod
    def arguments(rollout: RolloutSettings) -> dict[str, Any]:
        """Return the arguments without binning to the nearest trained resolution, which resizes the image."""
        return {**DiffusersPolicy.arguments(rollout), "use_resolution_binning": False}

    def cell(self) -> int:
        """Return the pixels per side of one latent, or of one patch if the transformer uses patches."""
        halvings = len(self.vae_config["encoder_block_out_channels"]) - 1
        return int(self.transformer.config.patch_size * 2**halvings)

    def latent_shape(self) -> tuple[int, ...]:
        """Return (channels, height, width) of one image's latents."""
        config = self.transformer.config
        return config.in_channels, self.high * config.patch_size, self.wide * config.patch_size

    def embed(self, text: str, *, negative: bool = False) -> Tensors:
        """Encode a prompt to states (L, D) and their mask (L,), without those of the instruction."""
        hidden, mask, *_ = self.pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.text_tokens,
            complex_human_instruction=None if negative else INSTRUCTION,
        )
        return {"hidden": hidden[0], "mask": mask[0]}

    def text_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of states and mask."""
        return {**super().text_shapes(clip_tokens), "mask": (self.text_tokens,)}

    def text_readers(self, pipeline: Any) -> list[TextReader]:
        """Describe Gemma; of the instruction only the first token and the rest after truncation count."""
        instruction = "\n".join(INSTRUCTION)
        count = plain(pipeline.tokenizer)

        def instructed(texts: Sequence[str]) -> list[int]:
            kept = count([instruction])[0] - 2  # as SanaPipeline makes room for the instruction
            written = [instruction + text for text in pipeline._text_preprocessing(list(texts))]
            return [length - kept for length in count(written)]

        return [TextReader("Gemma", self.text_tokens, instructed)]

    def predict(self, model: Velocity, x: Tensor, timestep: Tensor, text: Tensors) -> Tensor:
        """Predict with the transformer, without the variance that some versions learn as well."""
        v: Tensor = model(
            x,
            encoder_hidden_states=text["hidden"],
            encoder_attention_mask=text["mask"],
            timestep=timestep * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return v[:, : x.shape[1]]
