"""A tiny CLIP and a tiny Mask2Former with random weights in their real formats, and what to show them."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from rewards.scorers.geneval import ALIASES, CLASSES

Images = NDArray[np.uint8]
TINY_CLIP: dict[str, Any] = {
    "embed_dim": 768,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
"""A preprocessing that is not OpenAI's."""
BOXES = [(4.0, 4.0, 20.0, 20.0), (40.0, 4.0, 60.0, 20.0), (4.0, 40.0, 20.0, 60.0)]


def save_clip(folder: Path) -> None:
    """In open_clip's format; its weights are spread wide enough for texts and images to differ."""
    preprocessing = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}")
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def save_detector(folder: Path) -> None:
    """In transformers' format; its classes have the names that detectors use."""
    former = {new: old for old, new in ALIASES.items()}
    swin = SwinConfig(
        embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2,
        encoder_feedforward_dim=64, dim_feedforward=64, encoder_layers=1, decoder_layers=2, num_queries=10,
        id2label=dict(enumerate(former.get(name, name) for name in CLASSES)),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
        for parameter in model.class_predictor.parameters():
            parameter.data *= 20
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder)  # as published


def planted(*objects: tuple[str, float, tuple[float, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (Q, C + 1) and (Q, 64, 64) by which queries see classes, so probably, surely in these boxes."""
    classes = torch.full((len(objects), len(CLASSES) + 1), -20.0)
    masks = torch.full((len(objects), 64, 64), -20.0)
    for query, (kind, probability, (left, top, right, bottom)) in enumerate(objects):
        classes[query, CLASSES.index(kind)] = np.log(probability)
        classes[query, -1] = np.log(1 - probability)
        masks[query, int(top) : int(bottom), int(left) : int(right)] = 20.0
    return classes, masks


def noise_images(count: int, height: int = 48, width: int = 48) -> Images:
    """Images of random squares of 8 pixels."""
    blocks = np.random.default_rng(0).integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, 1).repeat(8, 2)


def png(side: int, depth: int, pixels: bytes) -> bytes:
    """A square RGB file of so many bits per channel, from its compressed rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
