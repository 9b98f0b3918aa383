"""Z-Image: conventions of diffusers' ZImagePipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rollout.families.diffusers_policy import DiffusersPolicy
from rollout.families.prompt_lengths import TextReader, chat_reader
from rollout.families.registry import Tensors, Velocity
from rollout.settings import RolloutSettings


class ZImage(DiffusersPolicy):
    """Qwen3's penultimate states in one stream with the image; the transformer runs from image to noise."""

    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    @staticmethod
    def arguments(rollout: RolloutSettings) -> dict[str, Any]:
        """The pipeline counts guidance from 0 (none), where everybody else counts from 1."""
        return {**DiffusersPolicy.arguments(rollout), "guidance_scale": rollout.guidance - 1}

    def cell(self) -> int:
        """Two latents on a side."""
        return int(2 ** len(self.vae_config["block_out_channels"]))

    def positions(self) -> int | None:
        """The shorter of the tables for rows and columns."""
        return int(min(self.transformer.config.axes_lens[1:]))

    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one latent."""
        return self.transformer.config.in_channels, 2 * self.high, 2 * self.wide

    def spacing(self, steps: int) -> dict[str, Any]:
        """Shifted by the image's size, if the scheduler does."""
        return self.shifted_spacing(steps)

    def embed(self, text: str, *, negative: bool = False) -> Tensors:
        """States (L, D), zeros after the prompt's end, and their mask (L,)."""
        length = self.rollout.text_tokens
        (hidden,), _ = self.pipeline.encode_prompt(
            text, device=self.device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        mask = torch.arange(length, device=self.device) < len(hidden)
        return {"hidden": pad(hidden, (0, 0, 0, length - len(hidden))), "mask": mask}

    def text_readers(self, pipeline: Any) -> list[TextReader]:
        """Qwen3, of a chat with room to think."""
        return [chat_reader("Qwen3", pipeline.tokenizer, self.rollout.text_tokens, enable_thinking=True)]

    def predict(self, model: Velocity, x: Tensor, timestep: Tensor, text: Tensors) -> Tensor:
        """Lists, since a prompt's length decides where its image lies; time and velocity turned round."""
        lengths = text["mask"].sum(1).tolist()
        found = model(
            list(x.unsqueeze(2)),
            (1000 - timestep) / 1000,
            [states[:length] for states, length in zip(text["hidden"], lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(list(found)).squeeze(2)
