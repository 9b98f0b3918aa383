"""The base of all families' adapters: loading, guidance, the scheduler's noise levels and decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from rollout.families.embeddings import Embedder, known_identity, source_of
from rollout.families.pipeline_parts import (
    add_text_encoders,
    read_part,
    read_pipeline,
    shape_of,
    text_encoders,
)  # fmt: skip
from rollout.families.prompt_lengths import TextReader
from rollout.families.registry import Schedule, Tensors, Velocity
from rollout.families.transformer import compile_blocks, compile_decoder, prepare, switch_attention
from rollout.settings import ModelSettings, RolloutSettings


def coordinates(*counts: int, device: torch.device) -> Tensor:
    """Return the coordinates of every token, (product of counts, number of counts), the last axis fastest."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts))


def _finite(values: Tensor) -> Tensor:
    return values.isfinite().flatten(1).all(1)


class DiffusersPolicy(ABC):
    """A policy on a diffusers pipeline; subclasses define a family: see README.md, "Add a family"."""

    lora_targets: Sequence[str]
    """Names of the attention projections, as peft matches them: the whole name, or its end after a dot."""
    text_limit = 512
    """The largest ``rollout.text_tokens`` that the family's pipeline accepts."""
    text_default = 128
    """``rollout.text_tokens`` if it is not set; 512 for models that were trained to attend to padding."""

    text_width = "joint_attention_dim"
    """The key of the transformer's configuration that has the width of a prompt's states."""

    def __init__(
        self,
        model: ModelSettings,
        rollout: RolloutSettings,
        *,
        device: str,
        seed: int,
        whole: bool,
        placed: bool = True,
    ) -> None:
        """Load the pipeline, or only its transformer and scheduler when nothing is decoded or encoded.

        Without ``placed`` the transformer stays in the CPU's memory.

        Raises:
            ValueError: if the image size does not fit the model, or `check` refuses the settings.
        """
        self.rollout = rollout = self.with_defaults(rollout)
        self.device, self.path = torch.device(device), model.path
        self.dtype = getattr(torch, model.dtype)
        # A model on the meta device is only counted, as if its parameters were stored rounded.
        self.autocasts = model.autocasts and device != "meta"
        self.index = DiffusionPipeline.load_config(model.path)
        self.vae_config: dict[str, Any] = AutoencoderKL.load_config(model.path, subfolder="vae")
        self._negative: Tensors = {}
        self.check()
        if whole:
            self.pipeline = self._load_pipeline()
            self.embedder = self._embedder()
            transformer, self.scheduler = self.pipeline.transformer, self.pipeline.scheduler
        else:
            if device == "meta":
                transformer = shape_of(model.path, self.index, self.dtype)
            else:
                transformer = read_part(model.path, self.index, "transformer", dtype=self._stored)
            self.scheduler = read_part(model.path, self.index, "scheduler")
        self.transformer = transformer.to(self.device) if placed else transformer
        if model.attention is not None:
            switch_attention(self.transformer, model.attention)
        self.adapter = prepare(self.transformer, model, self.lora_targets, seed, self.index["_class_name"])
        if model.compile:
            self.compile()
        self.high, self.wide = self._grid()

    def compile(self) -> None:
        """Compile the transformer's blocks, and the decoder if it is loaded; the first calls do the work."""
        compile_blocks(self.transformer)
        if hasattr(self, "pipeline") and self.rollout.decode == "whole":
            compile_decoder(self.pipeline.vae)

    @classmethod
    def with_defaults(cls, rollout: RolloutSettings) -> RolloutSettings:
        """Set the family's own length of prompts where no other is set."""
        if rollout.text_tokens is not None:
            return rollout
        return rollout.model_copy(update={"text_tokens": cls.text_default})

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt."""
        assert self.rollout.text_tokens is not None  # set by `with_defaults`
        return self.rollout.text_tokens

    def _load_pipeline(self) -> Any:
        # The autoencoder in float32: half precision is visible in flat areas, and decoding is cheap.
        dtypes = {"default": self.dtype, "transformer": self._stored, "vae": torch.float32}
        known = known_identity(self.rollout.embeddings, self._source)
        pipeline = read_pipeline(self.path, self.index, dtypes, text_encoders(self.index) if known else ())
        pipeline.vae.to(self.device)
        if self.rollout.decode != "whole":
            pipeline.vae.enable_slicing()
        if self.rollout.decode == "tiled":
            pipeline.vae.enable_tiling()
        return pipeline

    def load_text(self, device: str) -> None:
        """Load the text encoders alone, to fill ``rollout.embeddings`` with a policy of the meta device."""
        self.device = torch.device(device)
        self.pipeline = read_pipeline(self.path, self.index, {"default": self.dtype}, ("transformer", "vae"))
        self.pipeline.register_modules(transformer=self.transformer)  # whose sizes some families need
        self.embedder = self._embedder()

    def _embedder(self) -> Embedder:
        def load() -> None:
            add_text_encoders(self.pipeline, self.path, self.index, self.dtype)

        return Embedder(self.pipeline, self.embed, self.rollout, self.device, source=self._source, load=load)

    @cached_property
    def _source(self) -> str:
        """Recognise what determines embeddings, if they are stored."""
        if self.rollout.embeddings is None:
            return ""
        return source_of(self.path, self.index["_class_name"], str(self.dtype), self.text_tokens)

    @property
    def _stored(self) -> torch.dtype:
        """The precision in which the transformer's weights are loaded; diffusers keeps some in float32."""
        return torch.float32 if self.autocasts else self.dtype

    def _grid(self) -> tuple[int, int]:
        cell, width, height = self.cell(), self.rollout.width, self.rollout.height
        if width % cell or height % cell:
            raise ValueError(
                f"rollout.width and rollout.height: got {width} x {height}, expected multiples of {cell} "
                f"for a {self.index['_class_name']}"
            )
        most = self.positions()
        if most is not None and max(width, height) > most * cell:
            raise ValueError(
                f"rollout.width and rollout.height: got {width} x {height}, expected at most {most * cell} "
                "on a side, for which the model has positions"
            )
        return height // cell, width // cell

    def check(self) -> None:
        """Refuse settings that the family does not support, before anything large is loaded.

        Raises:
            ValueError: if videos are requested from a model of images.
        """
        if self.rollout.frames > 1:
            raise ValueError(
                f"rollout.frames: got {self.rollout.frames}, but a {self.index['_class_name']} makes images"
            )

    def check_text_tokens(self) -> None:
        """Refuse prompts longer than the family's pipeline accepts.

        Raises:
            ValueError: if ``rollout.text_tokens`` is above `text_limit`.
        """
        if self.text_tokens > self.text_limit:
            raise ValueError(
                f"rollout.text_tokens: got {self.text_tokens}, expected at most {self.text_limit} "
                f"for a {self.index['_class_name']}"
            )

    @abstractmethod
    def text_readers(self, pipeline: Any) -> list[TextReader]:
        """Describe the tokenizers of a pipeline, with the same text and truncation as in `embed`."""

    @staticmethod
    def arguments(rollout: RolloutSettings) -> dict[str, Any]:
        """Return the arguments of the diffusers pipeline for these settings' guidance and prompt length."""
        return {"guidance_scale": rollout.guidance, "max_sequence_length": rollout.text_tokens}

    @property
    def guided(self) -> bool:
        """True if every step also runs the empty prompt, for classifier-free guidance."""
        return self.rollout.guidance > 1

    @abstractmethod
    def cell(self) -> int:
        """Return the pixels per side of an image token; an image has ``high`` x ``wide`` tokens."""

    def positions(self) -> int | None:
        """Return the largest side in image tokens for which the model has positions; None if unlimited."""
        return None

    @property
    def tokens(self) -> int:
        """Image tokens of one candidate, as the transformer sees it."""
        return self.high * self.wide

    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape in which the pipeline draws an image's noise."""

    @abstractmethod
    def embed(self, text: str, *, negative: bool = False) -> Tensors:
        """Encode one prompt to named tensors of the same shapes for every prompt, without batch dimension."""

    def text_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `embed`'s tensors; ``clip_tokens`` is a prompt's length in CLIP."""
        return {"hidden": (self.text_tokens, self.transformer.config[self.text_width])}

    @abstractmethod
    def predict(self, model: Velocity, x: Tensor, timestep: Tensor, text: Tensors) -> Tensor:
        """Predict the velocity from image to noise, shaped like ``x`` (N, ...) in the compute precision."""

    def spacing(self, steps: int) -> dict[str, Any]:
        """Return the arguments of the scheduler's ``set_timesteps``, as the pipeline passes them."""
        return {"num_inference_steps": steps}

    def shifted_spacing(self, steps: int, mu: float | None = None) -> dict[str, Any]:
        """Return even noise levels, shifted by ``mu``, which by default is `shift`."""
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": self.shift() if mu is None else mu}

    def shift(self, most: float = 1.15) -> float:
        """Return the scheduler's shift, which grows with the number of image tokens up to ``most``."""
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        limits = (
            self.scheduler.config.get(name, default)
            for name, default in zip(names, (256, 4096, 0.5, most), strict=True)
        )
        return float(calculate_shift(self.high * self.wide, *limits))

    def schedule(self, steps: int) -> Schedule:
        """Compute the scheduler's noise levels and timesteps.

        Raises:
            ValueError: if the pipeline's scheduler is not for flow matching, or cannot make so many steps.
        """
        with np.errstate(all="ignore"):  # values that are not finite are refused below
            self.scheduler.set_timesteps(**self.spacing(steps))
        sigmas = self.scheduler.sigmas.float().cpu()
        if not 0.99 < sigmas[0] <= 1:
            name = type(self.scheduler).__name__
            raise ValueError(f"{name}: the first noise level is {sigmas[0]:.3f}, expected 1 (flow matching)")
        # Multistep solvers start slightly below 1, for their logarithms; the SDE starts from pure noise.
        sigmas[0] = 1
        if not (sigmas.diff() < 0).all():
            raise ValueError(
                f"{type(self.scheduler).__name__}: the noise levels of {steps} steps do not fall"
            )
        return Schedule(sigmas, self.scheduler.timesteps.float().cpu())

    @torch.no_grad()
    def encode(self, text: str) -> Tensors:
        """Encode one prompt to named tensors; with guidance also ``negative_*``, encoded only once."""
        if self.guided and not self._negative:
            found = self.embedder("", negative=True)
            self._negative = {f"negative_{name}": value for name, value in found.items()}
        return self.embedder(text) | (self._negative if self.guided else {})

    def velocity(self, model: Velocity, x: Tensor, timestep: Tensor, conditioning: Tensors) -> Tensor:
        """Compute the velocity (N, ...) in float32, with guidance from two passes of N rows each.

        The pass without the prompt records no gradient: it is a constant that guidance extrapolates from, as
        in Flow-GRPO's paper. Sampler and learner make the same passes, since in half precision the number of
        rows may change how a GPU rounds.
        """
        text = {name: value for name, value in conditioning.items() if not name.startswith("negative_")}
        if not self.guided:
            return self._branch(model, x, timestep, text)
        with torch.no_grad():
            without = self._branch(model, x, timestep, {n: conditioning[f"negative_{n}"] for n in text})
        return self.combine(without, self._branch(model, x, timestep, text))

    def _branch(self, model: Velocity, x: Tensor, timestep: Tensor, text: Tensors) -> Tensor:
        with torch.autocast(self.device.type, self.dtype) if self.autocasts else nullcontext():
            return self.predict(model, x.to(self.dtype), timestep, text).float()

    def combine(self, without: Tensor, with_prompt: Tensor) -> Tensor:
        """Combine two velocities (N, ...) by classifier-free guidance."""
        return without + self.rollout.guidance * (with_prompt - without)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Decode clean latents (N, ...) to images (N, H, W, 3) uint8 and a mask (N,) of the finite ones.

        If an image's latents or pixels are not finite, its row is zeros, to be left out.
        """
        pixels = self.pixels(latents.float())
        finite = _finite(latents) & _finite(pixels)
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
        levels = levels.where(finite.view(-1, 1, 1, 1), 0)  # integers cannot represent NaN
        return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu(), finite.cpu()

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode clean latents (N, C, h, w) to pixels (N, 3, H, W) in [-1, 1]."""
        vae = self.pipeline.vae
        shift = vae.config.get("shift_factor") or 0.0
        decoded: Tensor = vae.decode(latents / vae.config.scaling_factor + shift).sample
        return decoded
