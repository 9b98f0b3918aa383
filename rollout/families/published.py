"""The sizes of published models by their names on the hub, for plans and estimates without a download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rollout.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class PublishedSize:
    """Parameters of the transformer and of all text encoders together."""

    transformer: float
    encoders: float

    def weights(self, model: ModelSettings) -> float:
        """Compute the bytes of the transformer, whose parameters are float32 if all are trained."""
        return self.transformer * (4 if model.autocasts or model.dtype == "float32" else 2)

    def text(self, model: ModelSettings) -> float:
        """Compute the bytes of the text encoders."""
        return self.encoders * (4 if model.dtype == "float32" else 2)


T5_CLIP: Final = 4.89e9
T5_CLIP_CLIP: Final = 5.58e9
QWEN3_4B: Final = 4.02e9
UMT5: Final = 5.68e9

PUBLISHED_SIZES: Final = {
    "stabilityai/stable-diffusion-3-medium-diffusers": PublishedSize(2.03e9, T5_CLIP_CLIP),
    "stabilityai/stable-diffusion-3.5-medium": PublishedSize(2.25e9, T5_CLIP_CLIP),
    "stabilityai/stable-diffusion-3.5-large": PublishedSize(8.06e9, T5_CLIP_CLIP),
    "black-forest-labs/FLUX.1-dev": PublishedSize(11.9e9, T5_CLIP),
    "black-forest-labs/FLUX.1-schnell": PublishedSize(11.9e9, T5_CLIP),
    "black-forest-labs/FLUX.2-dev": PublishedSize(32.2e9, 24.0e9),
    "black-forest-labs/FLUX.2-klein-4B": PublishedSize(3.9e9, QWEN3_4B),
    "black-forest-labs/FLUX.2-klein-base-4B": PublishedSize(3.9e9, QWEN3_4B),
    "black-forest-labs/FLUX.2-klein-9B": PublishedSize(9.1e9, 8.19e9),
    "Qwen/Qwen-Image": PublishedSize(20.4e9, 8.29e9),
    "Tongyi-MAI/Z-Image-Turbo": PublishedSize(6.15e9, QWEN3_4B),
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": PublishedSize(1.6e9, 2.61e9),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": PublishedSize(1.42e9, UMT5),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": PublishedSize(14.3e9, UMT5),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": PublishedSize(5.0e9, UMT5),
}
"""Rounded, from the models' configurations and cards."""
