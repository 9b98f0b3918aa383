"""Wan 2.1 and Wan 2.2 (TI2V-5B), text to video, by the conventions of diffusers' WanPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from rollout.families.diffusers_policy import DiffusersPolicy
from rollout.families.prompt_lengths import TextReader, plain
from rollout.families.registry import ModelFolderError, Tensors, Velocity
from rollout.settings import RolloutSettings


class Wan(DiffusersPolicy):
    """Wan: UMT5's states; latents are videos, and rewards see their middle frame."""

    text_default = 512
    text_width = "text_dim"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def check(self) -> None:
        """Refuse unsupported lengths of videos and pipelines of two transformers.

        Raises:
            ModelFolderError: if the pipeline has two transformers (Wan 2.2 A14B): only one can be trained.
            ValueError: if the video's length does not fit the model.
        """
        self.temporal = int(self.vae_config.get("scale_factor_temporal", 4))
        frames, boundary = self.rollout.frames, self.index.get("boundary_ratio")
        if frames % self.temporal != 1:
            raise ValueError(
                f"rollout.frames: got {frames}, expected 1 more than a multiple of {self.temporal}"
            )
        if boundary is not None:
            raise ModelFolderError(
                f"model.path: the pipeline has two transformers (boundary_ratio {boundary}); "
                "only Wan pipelines with one can be trained"
            )

    @staticmethod
    def arguments(rollout: RolloutSettings) -> dict[str, Any]:
        """Return the arguments with the length of the video."""
        return {**DiffusersPolicy.arguments(rollout), "num_frames": rollout.frames}

    def cell(self) -> int:
        """Return the pixels per side of a patch of latents."""
        spatial = self.vae_config.get("scale_factor_spatial", 8)
        return int(self.transformer.config.patch_size[1] * spatial)

    def positions(self) -> int | None:
        """Return the length of the one table for rows, columns and latent frames.

        Raises:
            ValueError: if the video has more latent frames than that.
        """
        most = int(self.transformer.config.rope_max_seq_len)
        if self._frames > most:
            longest = (most - 1) * self.temporal + 1
            raise ValueError(
                f"rollout.frames: got {self.rollout.frames}, expected at most {longest}, for which the model "
                "has positions"
            )
        return most

    @property
    def tokens(self) -> int:
        """Image tokens of all latent frames together."""
        return self._frames * super().tokens

    @property
    def _frames(self) -> int:
        return (self.rollout.frames - 1) // self.temporal + 1

    def latent_shape(self) -> tuple[int, ...]:
        """Return (channels, frames, height, width) of the latents: frame 1, then one for four frames each."""
        patch = self.transformer.config.patch_size[1]
        return self.transformer.config.in_channels, self._frames, self.high * patch, self.wide * patch

    def embed(self, text: str, *, negative: bool = False) -> Tensors:
        """Encode a prompt to states (L, D), zeros after its end."""
        hidden, _ = self.pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
            device=self.device,
        )
        return {"hidden": hidden[0]}

    def text_readers(self, pipeline: Any) -> list[TextReader]:
        """Describe UMT5 on the prompt as the pipeline cleans it."""
        count = plain(pipeline.tokenizer)

        def cleaned(texts: Sequence[str]) -> list[int]:
            return count([prompt_clean(text) for text in texts])

        return [TextReader("UMT5", self.text_tokens, cleaned)]

    def predict(self, model: Velocity, x: Tensor, timestep: Tensor, text: Tensors) -> Tensor:
        """Predict with the transformer.

        The pipeline passes the 5B model a timestep per token; without an image to start from all are equal,
        and one is equivalent.
        """
        return model(
            hidden_states=x, timestep=timestep, encoder_hidden_states=text["hidden"], return_dict=False
        )[0]

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode the middle frame and, since the autoencoder is causal, only the frames before it."""
        vae = self.pipeline.vae
        middle = (self.rollout.frames - 1) // 2
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        needed = latents[:, :, : -(-middle // self.temporal) + 1]
        video: Tensor = vae.decode(needed * std + mean).sample
        return video[:, :, middle]
