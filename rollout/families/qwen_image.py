"""Qwen-Image, by the conventions of diffusers' QwenImagePipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from rollout.families.diffusers_policy import DiffusersPolicy
from rollout.families.prompt_lengths import TextReader, plain
from rollout.families.registry import Tensors, Velocity
from rollout.settings import RolloutSettings


class QwenImage(DiffusersPolicy):
    """Qwen-Image: Qwen2.5-VL's states with their mask, true guidance that keeps token norms, a video VAE."""

    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    text_limit = 1024

    @staticmethod
    def arguments(rollout: RolloutSettings) -> dict[str, Any]:
        """Return the arguments of true guidance, with a blank negative prompt as the model's authors use."""
        return {
            "true_cfg_scale": rollout.guidance,
            "negative_prompt": " ",
            "max_sequence_length": rollout.text_tokens,
        }

    def cell(self) -> int:
        """Return the pixels per side of two latents."""
        return int(2 * 2 ** len(self.vae_config["temperal_downsample"]))

    def latent_shape(self) -> tuple[int, ...]:
        """Return (channels, height, width), not packed."""
        return self.transformer.config.in_channels // 4, 2 * self.high, 2 * self.wide

    def spacing(self, steps: int) -> dict[str, Any]:
        """Return noise levels shifted by the image's size."""
        return self.shifted_spacing(steps)

    def embed(self, text: str, *, negative: bool = False) -> Tensors:
        """Encode a prompt to states (L, D), zeros after its end, and their mask (L,)."""
        length = self.text_tokens
        hidden, mask = self.pipeline.encode_prompt(
            " " if negative else text, device=self.device, max_sequence_length=length
        )
        if mask is None:  # no padding within this batch of one
            mask = torch.ones(hidden.shape[:2], device=self.device)
        room = length - hidden.shape[1]
        return {"hidden": pad(hidden[0], (0, 0, 0, room)), "mask": pad(mask[0].bool(), (0, room))}

    def text_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of states and mask."""
        return {**super().text_shapes(clip_tokens), "mask": (self.text_tokens,)}

    def text_readers(self, pipeline: Any) -> list[TextReader]:
        """Describe Qwen2.5-VL on a chat, whose beginning the pipeline removes again."""
        count, dropped = plain(pipeline.tokenizer), pipeline.prompt_template_encode_start_idx

        def chats(texts: Sequence[str]) -> list[int]:
            written = [pipeline.prompt_template_encode.format(text) for text in texts]
            return [length - dropped for length in count(written)]

        return [TextReader("Qwen2.5-VL", self.text_tokens, chats)]

    def predict(self, model: Velocity, x: Tensor, timestep: Tensor, text: Tensors) -> Tensor:
        """Predict on packed latents, with the noise level in [0, 1] as input."""
        v: Tensor = model(
            hidden_states=pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
            timestep=timestep / 1000,
            encoder_hidden_states=text["hidden"],
            encoder_hidden_states_mask=text["mask"],
            img_shapes=[[(1, self.high, self.wide)]] * len(x),
            return_dict=False,
        )[0]
        return pixel_shuffle(v.transpose(1, 2).unflatten(2, (self.high, self.wide)), 2)

    def combine(self, without: Tensor, with_prompt: Tensor) -> Tensor:
        """Apply guidance and scale every token back to its norm with the prompt alone."""
        guided = pixel_unshuffle(super().combine(without, with_prompt), 2)
        length = pixel_unshuffle(with_prompt, 2).norm(dim=1, keepdim=True)
        return pixel_shuffle(guided * (length / guided.norm(dim=1, keepdim=True)), 2)

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode the only frame of a video, with its latents scaled channel by channel."""
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        video: Tensor = vae.decode(latents.unsqueeze(2) * std + mean).sample
        return video[:, :, 0]
