"""Pretraining of a bundled model: an autoencoder, then flow matching on captions partly wrong on purpose.

Run as ``python -m rollout.tiny.pretrain shapes`` (or ``words``). Flow matching first sees true captions, from
which it learns to draw what they say, and then captions with wrong attributes, which make it err: noise then
decides which attributes are right, and reinforcement learning has something to improve.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from rollout.tiny.build import WORLDS, build_pipeline
from rollout.tiny.prompt_files import word_line
from rollout.tiny.world import (
    LETTERS,
    corrupt,
    corrupt_word,
    draw_scene,
    draw_word,
    scene_for,
    scene_prompts,
)

CORRUPTION = {"shapes": 0.4, "words": 0.35}
EMPTY_CAPTION_SHARE = 0.1
"""Share of captions that are dropped, so that the model supports classifier-free guidance."""

console = Console()


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes of one pretraining.

    ``images`` per bank, ``vae_steps`` of the autoencoder, and steps of the flow on true captions
    (``true_steps``) and on partly false ones (``false_steps``).
    """

    task: str
    seed: int
    images: int
    vae_steps: int
    true_steps: int
    false_steps: int
    batch: int = 64
    vae_batch: int = 32


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of flow matching: chance of a wrong attribute, seed, steps and learning rate."""

    chance: float
    seed: int
    steps: int
    rate: float


def bank(recipe: Recipe, chance: float, seed: int) -> tuple[list[str], NDArray[np.uint8]]:
    """Draw captions and images (N, H, W, 3); each attribute of a caption is wrong with the given chance."""
    rng = np.random.default_rng(seed)
    make = _scene_pairs(chance, rng) if recipe.task == "shapes" else _word_pairs(chance, rng)
    pairs = [next(make) for _ in range(recipe.images)]
    return [caption for caption, _ in pairs], np.stack([image for _, image in pairs])


def _scene_pairs(chance: float, rng: np.random.Generator) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    lines = list(scene_prompts())
    by_tag: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_tag.setdefault(line["tag"], []).append(line)
    tags = list(by_tag)
    while True:
        members = by_tag[tags[int(rng.integers(len(tags)))]]
        line = members[int(rng.integers(len(members)))]
        yield line["prompt"], draw_scene(scene_for(corrupt(line, chance, rng), rng))


def _word_pairs(chance: float, rng: np.random.Generator) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    while True:
        word = "".join(rng.choice(list(LETTERS), size=3))
        yield word_line(word)["prompt"], draw_word(corrupt_word(word, chance, rng))


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """Convert (N, H, W, 3) uint8 to (N, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def descend(
    parameters: list[Tensor], rate: float, steps: int, loss_of: Callable[[], Tensor], name: str
) -> None:
    """Minimise a loss that draws its own batches by Adam with warm-up and cosine decay."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
    average = 0.0
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * decay)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % max(1, steps // 20) == 0:
            console.print(f"{name} step {step + 1}/{steps}: loss {average:.4f}")


def train_vae(vae: AutoencoderKL, images: Tensor, recipe: Recipe, generator: torch.Generator) -> None:
    """Train the autoencoder to reconstruct images from noisy latents.

    The encoder then represents what matters by large differences, which a small flow model can learn, and the
    decoder tolerates an SDE's residual noise.
    """

    def loss_of() -> Tensor:
        x = images[torch.randint(len(images), (recipe.vae_batch,), generator=generator)]
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        level = 0.6 * torch.rand(len(z), 1, 1, 1, generator=generator) * z.detach().std()
        noisy = z + level * torch.randn(z.shape, generator=generator)
        error: Tensor = F.mse_loss(vae.decode(noisy).sample, x)
        penalty: Tensor = 1e-4 * posterior.kl().mean() / z[0].numel()
        return error + penalty

    descend(list(vae.parameters()), 3e-3, recipe.vae_steps, loss_of, "autoencoder")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images to the autoencoder's latents, not normalised."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(256)])


def set_scale(vae: AutoencoderKL, images: Tensor) -> None:
    """Write the shift and scale that normalise latents into the autoencoder's configuration."""
    latents = encode(vae, images)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def normalised(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images to latents, shifted and scaled for the transformer."""
    scaled: Tensor = (encode(vae, images) - vae.config.shift_factor) * vae.config.scaling_factor
    return scaled


def train_flow(
    pipeline: StableDiffusion3Pipeline, captions: list[str], latents: Tensor, phase: Phase, batch: int
) -> None:
    """Train transformer and text encoders by flow matching: predict noise - data from a mix of both."""
    generator = torch.Generator().manual_seed(phase.seed)
    ids = pipeline.tokenizer(
        ["", *captions],
        padding="max_length",
        truncation=True,
        max_length=pipeline.tokenizer_max_length,
        return_tensors="pt",
    ).input_ids
    models = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)

    def loss_of() -> Tensor:
        pick = torch.randint(len(latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < EMPTY_CAPTION_SHARE
        hidden, pooled = encode_ids(pipeline, ids[torch.where(dropped, 0, pick + 1)])
        noise = torch.randn(latents[pick].shape, generator=generator)
        sigma = torch.rand(batch, 1, 1, 1, generator=generator)
        mixed = (1 - sigma) * latents[pick] + sigma * noise
        velocity = pipeline.transformer(
            hidden_states=mixed,
            timestep=sigma.flatten() * 1000,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
        ).sample
        return F.mse_loss(velocity, noise - latents[pick])

    parameters = [p for model in models for p in model.parameters()]
    descend(parameters, phase.rate, phase.steps, loss_of, f"flow, {phase.chance:.0%} wrong,")


def encode_ids(pipeline: StableDiffusion3Pipeline, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Encode captions like SD3's pipeline (without T5) to states and pooled embedding, with gradients."""
    outputs = [
        encoder(ids, output_hidden_states=True)
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    ]
    hidden = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
    return hidden, torch.cat([out.text_embeds for out in outputs], dim=-1)


def pretrain(recipe: Recipe) -> StableDiffusion3Pipeline:
    """Build and train the pipeline of a recipe; equal recipes give equal weights."""
    pipeline = build_pipeline(recipe.task, recipe.seed)
    _, images = bank(recipe, CORRUPTION[recipe.task], recipe.seed)
    train_vae(pipeline.vae, to_pixels(images), recipe, torch.Generator().manual_seed(recipe.seed))
    pipeline.vae.half().float()  # the flow learns the latents of the weights as they will be stored
    train_phases(pipeline, recipe)
    return pipeline


def train_phases(pipeline: StableDiffusion3Pipeline, recipe: Recipe) -> None:
    """Train the flow on true captions, then on partly false ones, with the same scale of latents."""
    chance = CORRUPTION[recipe.task]
    _, images = bank(recipe, chance, recipe.seed)
    set_scale(pipeline.vae, to_pixels(images))
    phases = (
        Phase(0.0, recipe.seed + 1, recipe.true_steps, 2e-3),
        Phase(chance, recipe.seed + 2, recipe.false_steps, 1e-3),
    )
    for phase in phases:
        captions, images = bank(recipe, phase.chance, phase.seed)
        latents = normalised(pipeline.vae, to_pixels(images))
        train_flow(pipeline, captions, latents, phase, recipe.batch)


def main() -> None:
    """Parse the command line, pretrain, and save the pipeline in the standard diffusers format."""
    parser = argparse.ArgumentParser(prog="python -m rollout.tiny.pretrain", description=__doc__)
    parser.add_argument("task", choices=sorted(WORLDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--vae-steps", type=int, default=700)
    parser.add_argument("--true-steps", type=int, default=2_000)
    parser.add_argument("--false-steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder to write (default: rollout/tiny/TASK)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = Recipe(
        task=options.task,
        seed=options.seed,
        images=options.images,
        vae_steps=options.vae_steps,
        true_steps=options.true_steps,
        false_steps=options.false_steps,
    )
    pipeline = pretrain(recipe)
    out = options.out or Path(__file__).parent / options.task
    pipeline.to(torch.float16).save_pretrained(out)
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
