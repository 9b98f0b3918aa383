"""Cheap statistics of a group's images, which shift when a policy hacks its reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards.scorers.jpeg import jpeg_bytes

Floats = NDArray[np.float32]

SIDE: Final = 128
"""Images are reduced to at most this many pixels a side, except for the JPEG."""
HUES: Final = 24
_LUMA: Final = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class ImageObserver:
    """Measures the images of one group per call, without Ray, prompts or rewards."""

    def ping(self) -> str:
        """Confirm that the worker responds."""
        return "observer"

    def measure(self, finite: Sequence[bool], *chunks: NDArray[np.uint8]) -> dict[str, float]:
        """Compute `group_statistics` of the finite images of a group, given as chunks (N, H, W, 3).

        Returns an empty mapping for fewer than two images, which cannot be compared.
        """
        images = np.concatenate(chunks)[np.asarray(finite)]
        return group_statistics(images) if len(images) > 1 else {}


def group_statistics(images: NDArray[np.uint8]) -> dict[str, float]:
    """Compute six statistics of the (N, H, W, 3) candidates of one prompt.

    - ``edge_density``: share of neighbouring pixels whose brightness differs by more than a tenth;
    - ``color_entropy``: entropy in bits of the group's hues, weighted by chroma; falls as colours converge;
    - ``dark_fraction``, ``saturated_fraction``: share of pixels of brightness under 0.1, and of bright pixels
      (value over 0.5) of a saturation over 0.9;
    - ``pairwise_distance``: root mean square difference of two candidates; falls as candidates converge;
    - ``jpeg_size``: bytes per pixel at quality 95.
    """
    small = _reduced(images)
    luma, high, low = small @ _LUMA, small.max(axis=-1), small.min(axis=-1)
    return {
        "edge_density": float(np.mean([np.mean(np.abs(np.diff(luma, axis=axis)) > 0.1) for axis in (1, 2)])),
        "color_entropy": _entropy(_hues(small, high, high - low)),
        "dark_fraction": float(np.mean(luma < 0.1)),
        "saturated_fraction": float(np.mean((high - low > 0.9 * high) & (high > 0.5))),
        "pairwise_distance": _pairwise_distance(small),
        "jpeg_size": float(np.mean([jpeg_bytes(image) for image in images]) / images[0, ..., 0].size),
    }


def _reduced(images: NDArray[np.uint8]) -> Floats:
    factor = math.ceil(max(images.shape[1:3]) / SIDE)
    small = images
    if factor > 1:
        small = np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images])
    return np.asarray(small, dtype=np.float32) / np.float32(255)


def _hues(images: Floats, high: Floats, chroma: Floats) -> NDArray[np.float64]:
    """Sum the chroma of all images in each bin of hue."""
    red, green, blue = np.moveaxis(images, -1, 0)
    width = np.maximum(chroma, 1e-6)
    sector = np.select(
        [high == red, high == green],
        [((green - blue) / width) % 6, (blue - red) / width + 2],
        (red - green) / width + 4,
    )
    # Bins are centred on the pure colours, which would otherwise lie on an edge between two bins.
    bins = np.round(sector * (HUES / 6)).astype(np.int64) % HUES
    weights = np.bincount(bins.ravel(), weights=chroma.ravel(), minlength=HUES)
    return np.asarray(weights, dtype=np.float64)


def _entropy(weights: NDArray[np.float64]) -> float:
    total = weights.sum()
    if total < 1e-9:
        return 0.0
    shares = weights[weights > 0] / total
    return float(-(shares * np.log2(shares)).sum())


def _pairwise_distance(images: Floats) -> float:
    """Compute the root mean square distance of all pairs: its square is 2 n / (n - 1) times the variance."""
    count = len(images)
    if count < 2:
        return 0.0
    return float(np.sqrt(2 * count / (count - 1) * np.mean(np.var(images, axis=0, dtype=np.float64))))
