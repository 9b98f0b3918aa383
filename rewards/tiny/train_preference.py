"""Training of the bundled preference model: a tiny CLIP and the Bradley-Terry loss on synthetic preferences.

Run as ``python -m rewards.tiny.train_preference``; it writes ``rewards/tiny/preference`` in the format that
`rewards.scorers.pickscore` loads, so that changing the model's name is enough to use the real PickScore.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from rewards.scorers.pickscore import SCALE
from rewards.tiny.pairs import Choice, choices, lines
from rollout.tiny.vocabulary import build_tokenizer

FOLDER: Final = Path(__file__).parent / "preference"
TOKENS: Final = 16
WIDTH: Final = 96
LOOKS_GAP: Final = 0.25
"""Least difference in looks of evaluated pairs of right images; closer pairs are nearly ties."""

console = Console()


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes of the training; ``bank`` and ``batch`` count captions, each with four images."""

    seed: int = 0
    bank: int = 12_000
    steps: int = 2_400
    batch: int = 48
    rate: float = 1.5e-3


def build_model(tokenizer: Any) -> Any:
    """Build an untrained `CLIPModel` for 32 x 32 images and prompts of 16 tokens."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={
            **shared,
            **tokens,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": TOKENS,
        },
        vision_config={**shared, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
        projection_dim=WIDTH,
        logit_scale_init_value=math.log(SCALE),  # so that a score is the cosine itself at first
    )
    return CLIPModel(config)


def build_processor(tokenizer: Any) -> Any:
    """Build the `CLIPProcessor` for `build_model`: pixels to [-1, 1], no other change at 32 x 32."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def to_pixels(batch: Sequence[Choice]) -> Tensor:
    """Convert all images of B choices to (B * G, 3, 32, 32) in [-1, 1]."""
    images = torch.from_numpy(np.concatenate([choice.images for choice in batch]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def logits(model: Any, tokenizer: Any, batch: Sequence[Choice]) -> Tensor:
    """Compute PickScore's logits (B, G), exp(logit scale) * cosine of every image and its caption."""
    tokens = tokenizer([choice.caption for choice in batch], padding="max_length", return_tensors="pt")
    texts = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    images = F.normalize(model.get_image_features(pixel_values=to_pixels(batch)).pooler_output, dim=-1)
    cosines = torch.einsum("bgd,bd->bg", images.unflatten(0, (len(batch), -1)), texts)
    scores: Tensor = model.logit_scale.exp() * cosines
    return scores


def bradley_terry(scores: Tensor, worth: Tensor) -> Tensor:
    """Compute the cross-entropy over all pairs of a caption's images; scores and worth are (B, G).

    P(a over b) is the sigmoid of the difference. Source: Bradley and Terry 1952; the targets are the same
    model's probabilities under the known worth.
    """
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    wanted = torch.sigmoid(worth[:, first] - worth[:, second])
    return F.binary_cross_entropy_with_logits(scores[:, first] - scores[:, second], wanted)


def train(recipe: Recipe) -> tuple[Any, Any]:
    """Train a model and return it with its processor; repeatable from the seed on one thread."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    bank = list(islice(choices(lines(held_out=False), rng), recipe.bank))
    tokenizer = build_tokenizer(TOKENS)
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.02, betas=(0.9, 0.98))
    started = time.perf_counter()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, recipe)
        batch = [bank[i] for i in rng.integers(len(bank), size=recipe.batch)]
        worth = torch.tensor(np.stack([choice.worth for choice in batch]), dtype=torch.float32)
        loss = bradley_terry(logits(model, tokenizer, batch), worth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, recipe.steps // 20) == 0:
            seconds = time.perf_counter() - started
            console.print(f"step {step + 1}/{recipe.steps}: loss {loss.item():.4f}, {seconds:.0f} s")
    return model.eval(), build_processor(tokenizer)


def _rate(step: int, recipe: Recipe) -> float:
    warm = min(1.0, (step + 1) / 100)
    return recipe.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, seed: int, count: int = 1500) -> dict[str, float]:
    """Measure the shares of held-out pairs that the model orders by their worth, over ``count`` captions.

    ``right`` pairs a right image with a wrong one, ``single`` does so for captions of one object only,
    ``looks`` pairs two right ones, ``all`` is over every pair; ``right gap`` and ``looks gap`` are the median
    differences of PickScore's scores in those pairs, the preferred image's minus the other's.
    """
    held = list(islice(choices(lines(held_out=True), np.random.default_rng(seed)), count))
    scores = torch.cat([logits(model, tokenizer, held[i : i + 100]) for i in range(0, count, 100)]).numpy()
    right: list[tuple[bool, float]] = []
    pretty: list[float] = []
    for choice, row in zip(held, scores, strict=True):
        single = choice.tag in ("single_object", "colors")
        right += [(single, row[a] - row[b]) for a in (0, 1) for b in (2, 3)]
        gap = choice.looks[0] - choice.looks[1]
        pretty += [(row[0] - row[1]) * np.sign(gap)] if abs(gap) >= LOOKS_GAP else []
    gaps = np.array([gap for _, gap in right])
    return {
        "all": float(np.mean([*(gaps > 0), *(np.array(pretty) > 0)])),
        "right": float(np.mean(gaps > 0)),
        "single": float(np.mean([gap > 0 for single, gap in right if single])),
        "looks": float(np.mean(np.array(pretty) > 0)),
        "right gap": float(np.median(gaps) / SCALE),
        "looks gap": float(np.median(pretty) / SCALE),
    }


def main() -> None:
    """Train and save the model, and print the figures of the model card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    model, processor = train(Recipe(seed=arguments.seed, steps=arguments.steps))
    model.save_pretrained(arguments.folder)
    processor.save_pretrained(arguments.folder)
    figures = accuracy(model, processor.tokenizer, seed=arguments.seed + 1)
    console.print(", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    console.print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
