"""What the adapters of all families share: loading, guidance, the scheduler's noise levels and pixels."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from rollout.families.embeddings import Embedder
from rollout.families.prompt_lengths import TextReader
from rollout.families.registry import Schedule, Tensors, Velocity
from rollout.families.transformer import compile_blocks, prepare, switch_attention
from rollout.settings import ModelSettings, RolloutSettings


def coordinates(*counts: int, device: torch.device) -> Tensor:
    """The place of every token, (product of counts, number of counts), the last axis fastest."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts))


def _finite(values: Tensor) -> Tensor:
    return values.isfinite().flatten(1).all(1)


class DiffusersPolicy(ABC):
    """A policy on a diffusers pipeline; a family says what is its own: see README.md, "Add a family"."""

    lora_targets: Sequence[str]
    """Names of the attention projections, as peft matches them: the whole name, or its end after a dot."""
    text_limit = 512
    """The longest ``rollout.text_tokens`` that the family's pipeline takes."""

    def __init__(
        self, model: ModelSettings, rollout: RolloutSettings, *, device: str, seed: int, whole: bool
    ) -> None:
        """Load the pipeline, or only its transformer and scheduler when nothing is decoded or encoded.

        Raises:
            ValueError: if the image size does not fit the model, and what `check` raises.
        """
        self.rollout = rollout
        self.device = torch.device(device)
        self.dtype = getattr(torch, model.dtype)
        self.index = DiffusionPipeline.load_config(model.path)
        self.vae_config: dict[str, Any] = AutoencoderKL.load_config(model.path, subfolder="vae")
        self._negative: Tensors = {}
        self.check()
        if whole:
            self.pipeline = self._load_pipeline(model.path)
            self.embedder = Embedder(self.pipeline, self.embed, rollout, self.device)
            transformer, self.scheduler = self.pipeline.transformer, self.pipeline.scheduler
        else:
            transformer = self._load_transformer(model.path)
            self.scheduler = self._load_part(model.path, "scheduler")
        self.transformer = transformer.to(self.device)
        if model.attention is not None:
            switch_attention(self.transformer, model.attention)
        self.adapter = prepare(self.transformer, model, self.lora_targets, seed, self.index["_class_name"])
        if model.compile:
            compile_blocks(self.transformer)
        self.high, self.wide = self._grid()

    def _load_pipeline(self, path: str) -> Any:
        # Components that were saved as missing (T5, usually); diffusers wants to be told so again.
        absent = {name: None for name, entry in self.index.items() if entry == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=self.dtype, **absent)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.float().to(self.device)  # half precision shows in flat areas, and decoding is cheap
        if self.rollout.decode != "whole":
            pipeline.vae.enable_slicing()
        if self.rollout.decode == "tiled":
            pipeline.vae.enable_tiling()
        return pipeline

    def _load_part(self, path: str, name: str, **options: Any) -> Any:
        return getattr(diffusers, self.index[name][1]).from_pretrained(path, subfolder=name, **options)

    def _load_transformer(self, path: str) -> Any:
        if self.device.type != "meta":
            return self._load_part(path, "transformer", dtype=self.dtype)
        # On the device without memory a model has shapes alone: enough to count, and nothing is read.
        made = getattr(diffusers, self.index["transformer"][1])
        with self.device:
            return made.from_config(made.load_config(path, subfolder="transformer")).to(self.dtype)

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
        """Refuse, before anything large is loaded, what the family cannot do.

        Raises:
            ValueError: if videos are asked of a model of images.
        """
        if self.rollout.frames > 1:
            raise ValueError(
                f"rollout.frames: got {self.rollout.frames}, but a {self.index['_class_name']} makes images"
            )

    def check_text_tokens(self) -> None:
        """Refuse prompts longer than the family's pipeline takes.

        Raises:
            ValueError: if ``rollout.text_tokens`` is more than that.
        """
        if self.rollout.text_tokens > self.text_limit:
            raise ValueError(
                f"rollout.text_tokens: got {self.rollout.text_tokens}, expected at most {self.text_limit} "
                f"for a {self.index['_class_name']}"
            )

    def load_tokenizers(self, path: str) -> Any:
        """The pipeline of diffusers with its tokenizers alone."""
        made = getattr(diffusers, self.index["_class_name"])
        parts: dict[str, Any] = dict.fromkeys(made._get_signature_keys(made)[0])
        for name in parts:
            library, kind = self.index.get(name, (None, None))
            if name.startswith("tokenizer") and library is not None:
                read = getattr(importlib.import_module(library), kind).from_pretrained
                parts[name] = read(path, subfolder=name)
        return made(**parts)

    @abstractmethod
    def text_readers(self, pipeline: Any) -> list[TextReader]:
        """How the tokenizers of a pipeline read prompts: the same text, the same cut as in `embed`."""

    @staticmethod
    def arguments(rollout: RolloutSettings) -> dict[str, Any]:
        """How the diffusers pipeline is called to guide and read prompts as these settings do."""
        return {"guidance_scale": rollout.guidance, "max_sequence_length": rollout.text_tokens}

    @property
    def guided(self) -> bool:
        """Whether every step also runs the empty prompt, for classifier-free guidance."""
        return self.rollout.guidance > 1

    @abstractmethod
    def cell(self) -> int:
        """Pixels on a side of what is one image token; ``high`` x ``wide`` tokens make an image."""

    def positions(self) -> int | None:
        """Image tokens on a side that the transformer has positions for; None if as many as one likes."""
        return None

    @property
    def tokens(self) -> int:
        """Image tokens of one candidate, as the transformer sees it."""
        return self.high * self.wide

    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """The shape in which the pipeline draws the noise of one image: equal seeds are equal noise."""

    @abstractmethod
    def embed(self, text: str, *, negative: bool = False) -> Tensors:
        """Named conditioning tensors of one prompt, the same shapes for every prompt, no batch dimension."""

    @abstractmethod
    def predict(self, model: Velocity, x: Tensor, timestep: Tensor, text: Tensors) -> Tensor:
        """Velocity from image to noise, shaped as ``x`` (N, ...), which comes in the compute precision."""

    def spacing(self, steps: int) -> dict[str, Any]:
        """The arguments of the scheduler's ``set_timesteps``, as the pipeline gives them."""
        return {"num_inference_steps": steps}

    def shifted_spacing(self, steps: int, mu: float | None = None) -> dict[str, Any]:
        """Even noise levels, shifted by ``mu``; by default it grows with the number of image tokens."""
        if mu is None:
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            limits = (self.scheduler.config.get(name, default) for name, default in zip(
                names, (256, 4096, 0.5, 1.15), strict=True
            ))  # fmt: skip
            mu = float(calculate_shift(self.high * self.wide, *limits))
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    def schedule(self, steps: int) -> Schedule:
        """The scheduler's noise levels and timesteps.

        Raises:
            ValueError: if the pipeline's scheduler is not one of flow matching, or cannot make so many steps.
        """
        with np.errstate(all="ignore"):  # what is not finite is refused below
            self.scheduler.set_timesteps(**self.spacing(steps))
        sigmas = self.scheduler.sigmas.float().cpu()
        if not 0.99 < sigmas[0] <= 1:
            name = type(self.scheduler).__name__
            raise ValueError(f"{name}: the first noise level is {sigmas[0]:.3f}, expected 1 (flow matching)")
        # Multistep solvers keep a little below 1, for their logarithms' sake; the SDE starts from pure noise.
        sigmas[0] = 1
        if not (sigmas.diff() < 0).all():
            raise ValueError(
                f"{type(self.scheduler).__name__}: the noise levels of {steps} steps do not fall"
            )
        return Schedule(sigmas, self.scheduler.timesteps.float().cpu())

    @torch.no_grad()
    def encode(self, text: str) -> Tensors:
        """Named conditioning tensors of one prompt; with guidance also ``negative_*``, encoded only once."""
        if self.guided and not self._negative:
            found = self.embedder("", negative=True)
            self._negative = {f"negative_{name}": value for name, value in found.items()}
        return self.embedder(text) | (self._negative if self.guided else {})

    def velocity(self, model: Velocity, x: Tensor, timestep: Tensor, conditioning: Tensors) -> Tensor:
        """Velocity (N, ...) in float32; with guidance both branches run as one batch.

        Where gradients are recorded, the branch without the prompt runs by itself and has none: it is a
        constant that guidance leads away from, as in Flow-GRPO's paper. The value is the same.
        """
        text = {name: value for name, value in conditioning.items() if not name.startswith("negative_")}
        x = x.to(self.dtype)
        if not self.guided:
            return self.predict(model, x, timestep, text).float()
        empty = {name: conditioning[f"negative_{name}"] for name in text}
        if torch.is_grad_enabled():
            with torch.no_grad():
                without = self.predict(model, x, timestep, empty)
            return self.combine(without.float(), self.predict(model, x, timestep, text).float())
        both = {name: torch.cat([empty[name], value]) for name, value in text.items()}
        v = self.predict(model, torch.cat([x, x]), torch.cat([timestep, timestep]), both)
        return self.combine(*v.float().chunk(2))

    def combine(self, without: Tensor, with_prompt: Tensor) -> Tensor:
        """Classifier-free guidance of two velocities (N, ...)."""
        return without + self.rollout.guidance * (with_prompt - without)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latents (N, ...) to images (N, H, W, 3) uint8, and which of them (N,) are finite.

        One that is not, in its latents or its pixels, is no image: its row is zeros, to be left out.
        """
        pixels = self.pixels(latents.float())
        finite = _finite(latents) & _finite(pixels)
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
        levels = levels.where(finite.view(-1, 1, 1, 1), 0)  # no integer is not a number
        return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu(), finite.cpu()

    def pixels(self, latents: Tensor) -> Tensor:
        """Clean latents (N, C, h, w) to pixels (N, 3, H, W) in [-1, 1]."""
        vae = self.pipeline.vae
        shift = vae.config.get("shift_factor") or 0.0
        decoded: Tensor = vae.decode(latents / vae.config.scaling_factor + shift).sample
        return decoded
