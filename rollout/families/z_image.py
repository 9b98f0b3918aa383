"""Z-Image, by the conventions of diffusers' ZImagePipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from rollout.families.diffusers_policy import DiffusersPolicy
from rollout.families.prompt_lengths import TextReader, chat_reader
from rollout.families.registry import Tensors, Velocity
from rollout.settings import RolloutSettings


class ZImage(DiffusersPolicy):
    """Z-Image: Qwen3's penultimate states in one stream with the image; time and velocity are reversed."""

    text_width = "cap_feat_dim"
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Load the pipeline, as every family."""
        super().__init__(*arguments, **options)
        self.lengths = WeakTensorKeyDictionary()

    @staticmethod
    def arguments(rollout: RolloutSettings) -> dict[str, Any]:
        """Return the arguments with guidance minus 1: this pipeline counts it from 0, the others from 1."""
        return {**DiffusersPolicy.arguments(rollout), "guidance_scale": rollout.guidance - 1}

    def cell(self) -> int:
        """Return the pixels per side of two latents."""
        return int(2 ** len(self.vae_config["block_out_channels"]))

    def positions(self) -> int | None:
        """Return the length of the shorter of the tables for rows and columns."""
        return int(min(self.transformer.config.axes_lens[1:]))

    def latent_shape(self) -> tuple[int, ...]:
        """Return (channels, height, width) of one image's latents."""
        return self.transformer.config.in_channels, 2 * self.high, 2 * self.wide

    def spacing(self, steps: int) -> dict[str, Any]:
        """Return noise levels shifted by the image's size, if the scheduler shifts them."""
        return self.shifted_spacing(steps)

    def embed(self, text: str, *, negative: bool = False) -> Tensors:
        """Encode a prompt to states (L, D), zeros after its end, and their mask (L,)."""
        length = self.text_tokens
        (hidden,), _ = self.pipeline.encode_prompt(
            text, device=self.device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        mask = torch.arange(length, device=self.device) < len(hidden)
        return {"hidden": pad(hidden, (0, 0, 0, length - len(hidden))), "mask": mask}

    def text_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of states and mask."""
        return {**super().text_shapes(clip_tokens), "mask": (self.text_tokens,)}

    def text_readers(self, pipeline: Any) -> list[TextReader]:
        """Describe Qwen3 on a chat with thinking enabled."""
        return [chat_reader("Qwen3", pipeline.tokenizer, self.text_tokens, enable_thinking=True)]

    def predict(self, model: Velocity, x: Tensor, timestep: Tensor, text: Tensors) -> Tensor:
        """Predict on lists, since a prompt's length sets its image's positions; reverse time and velocity."""
        lengths = self._lengths(text["mask"])
        found = model(
            list(x.unsqueeze(2)),
            (1000 - timestep) / 1000,
            [states[:length] for states, length in zip(text["hidden"], lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(list(found)).squeeze(2)

    def _lengths(self, mask: Tensor) -> list[int]:
        """Return the lengths of prompts; read once per batch, since the host waits for the device."""
        if mask.is_meta:
            return [mask.shape[1]] * len(mask)  # whose lengths are not known; a plan counts whole prompts
        if mask not in self.lengths:
            self.lengths[mask] = mask.sum(1).tolist()
        found: list[int] = self.lengths[mask]
        return found
