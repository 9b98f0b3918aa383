"""The reward of the bundled world: GenEval's rules over a detector of coloured shapes without training.

The detector works on whole batches. Pixels are labelled with the nearest hue of the palette, connected
pixels of one hue are a blob, and a blob is compared with renders of every shape, size and sub-pixel
position; the confidence is the fit of the best one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rewards.models.detection import Box, Detection
from rewards.scorer import Judgement, RewardError, Traits
from rewards.scorers.geneval_rules import Rules, apply_rules, check_metadata, to_judgement
from rollout.records import Prompt
from rollout.tiny.world import COLORS, SCENE_SIZE, SHAPES, Placed, Scene, draw_scene

RULES: Final = Rules(threshold=0.75, counting_threshold=0.75)
"""Renders fit at 0.85 or better, with noise of 8/255 at 0.78; a half disc or an inverted triangle at 0.72."""

Floats = NDArray[np.float32]
Ints = NDArray[np.intp]
_COLOR_NAMES: Final = tuple(COLORS)
_MIN_CHROMA: Final = 36.0
_MIN_BRIGHTNESS: Final = 0.45
_MIN_AREA: Final = 12
_HALF: Final = 9
_WINDOW: Final = 2 * _HALF + 1
_RADII: Final = np.arange(3.5, 8.6, 0.25)
_OFFSETS: Final = (0.0, 1 / 3, 2 / 3)
_IN_PLANE: Final = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True, slots=True)
class _Blobs:
    """Connected pixels of one hue over a batch: ``labels`` (N, K, H, W), 0 for background, and B slices."""

    labels: NDArray[np.int32]
    slices: Sequence[tuple[slice, ...]]
    brightness: Floats


class ShapesScorer:
    """Scorer of (N, 32, 32, 3) images of the bundled world by the soft score of GenEval's rules.

    ``details["strict"]`` is GenEval's accuracy. Needs GenEval metadata with the world's classes and colours.
    """

    traits: ClassVar[Traits] = Traits(low=0.0, high=1.0, thread_safe=True)

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Detect the shapes of every image and apply the rules by its prompt's metadata."""
        results = [
            apply_rules(found, prompt.metadata, RULES)
            for found, prompt in zip(detect(images), prompts, strict=True)
        ]
        return to_judgement(results)

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Refuse metadata that is not GenEval's with the world's classes and colours.

        Raises:
            ValueError: naming the key or value.
        """
        check_metadata(prompt.metadata, SHAPES, _COLOR_NAMES)


def detect(images: NDArray[np.uint8]) -> list[list[Detection]]:
    """Detect the shapes in each of (N, 32, 32, 3) uint8 images, at any confidence; ``box`` is in pixels.

    Raises:
        RewardError: if the images have another size.
    """
    if images.shape[1:] != (SCENE_SIZE, SCENE_SIZE, 3):
        raise RewardError(f"expected (N, {SCENE_SIZE}, {SCENE_SIZE}, 3) images, got {images.shape}")
    detections: list[list[Detection]] = [[] for _ in images]
    strength = _hue_strength(images)
    blobs = _find_blobs(strength)
    if blobs.slices:
        kinds, fits = _match(_windows(strength, blobs))
        for where, kind, fit in zip(blobs.slices, kinds, fits, strict=True):
            detections[where[0].start].append(
                Detection(
                    kind=SHAPES[kind],
                    confidence=float(fit),
                    box=_box(where),
                    color=_COLOR_NAMES[where[1].start],
                )
            )
    return detections


def _box(where: tuple[slice, ...]) -> Box:
    rows, columns = where[2], where[3]
    return float(columns.start), float(rows.start), float(columns.stop), float(rows.stop)


@lru_cache(maxsize=1)
def _palette() -> tuple[Floats, Floats]:
    """Compute the palette's unit chroma directions (K, 3) and full chroma lengths (K,)."""
    colors = np.array(list(COLORS.values()), dtype=np.float32)
    chroma = colors - colors.mean(1, keepdims=True)
    lengths = np.linalg.norm(chroma, axis=1)
    return chroma / lengths[:, None], lengths


def _hue_strength(images: NDArray[np.uint8]) -> Floats:
    """Compute the strength (N, K, H, W) of each pixel's nearest hue: 1 at the palette's colour, 0 elsewhere.

    Grey adds nothing to chroma, so on the edge of a shape this is brightness times coverage.
    """
    pixels = images.astype(np.float32)
    chroma = pixels - pixels.mean(3, keepdims=True)
    directions, lengths = _palette()
    along: Floats = np.einsum("nhwc,kc->nkhw", chroma, directions)
    nearest = along.argmax(1)[:, None] == np.arange(len(lengths))[None, :, None, None]
    strength = along / lengths[None, :, None, None]
    return np.where(nearest & (along > _MIN_CHROMA), strength, np.float32(0.0))


def _find_blobs(strength: Floats) -> _Blobs:
    """Find blobs of pixels with at least half coverage, relative to each blob's own brightness."""
    rough, count = _label(strength > 0)
    cores = _core_brightness(strength, rough, count)
    cores[0] = np.inf
    fine, count = _label(strength > 0.5 * cores[rough])
    sizes = np.bincount(fine.ravel(), minlength=count + 1)
    cores = _core_brightness(strength, fine, count)
    keep = (sizes >= _MIN_AREA) & (cores >= _MIN_BRIGHTNESS)
    keep[0] = False
    renumbered = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    labels = renumbered[fine]
    return _Blobs(labels, ndimage.find_objects(labels), cores[keep])


def _label(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    planes = mask.reshape(-1, *mask.shape[2:])
    labels, count = ndimage.label(planes, structure=_IN_PLANE)
    return labels.reshape(mask.shape), int(count)


def _core_brightness(strength: Floats, labels: NDArray[np.int32], count: int) -> Floats:
    """Compute each label's mean strength over its pixels above average: its inside, without its edge."""
    flat, values = labels.ravel(), strength.ravel()
    means = _label_means(flat, values, count)
    inside = values >= means[flat] - 1e-3
    return _label_means(flat[inside], values[inside], count)


def _label_means(labels: NDArray[np.int32], values: Floats, count: int) -> Floats:
    sums = np.bincount(labels, weights=values, minlength=count + 1)
    numbers = np.bincount(labels, minlength=count + 1)
    means: Floats = (sums / np.maximum(numbers, 1)).astype(np.float32)
    return means


def _windows(strength: Floats, blobs: _Blobs) -> Floats:
    """Compute the coverage of each blob in a window around its centre, as (B, window * window)."""
    shape = blobs.labels.shape
    flat_labels = blobs.labels.reshape(-1, *shape[2:])
    grown = ndimage.grey_dilation(flat_labels, size=(1, 3, 3)).reshape(shape)
    margin = ((0, 0), (0, 0), (_HALF, _HALF), (_HALF, _HALF))
    coverage = np.pad(strength, margin)
    grown = np.pad(grown, margin)
    planes, rows, columns = _centres(blobs)
    span = np.arange(_WINDOW)
    index = (
        planes[0][:, None, None],
        planes[1][:, None, None],
        (rows[:, None] + span)[:, :, None],
        (columns[:, None] + span)[:, None, :],
    )
    own = grown[index] == np.arange(1, len(rows) + 1)[:, None, None]
    windows: Floats = np.where(own, coverage[index] / blobs.brightness[:, None, None], np.float32(0.0))
    return windows.clip(0.0, 1.0).reshape(len(rows), -1)


def _centres(blobs: _Blobs) -> tuple[tuple[Ints, Ints], Ints, Ints]:
    """Return the image and colour index of each blob, and the row and column nearest to its centroid."""
    image, color, row, column = np.nonzero(blobs.labels)
    labels = blobs.labels[image, color, row, column] - 1
    sizes = np.bincount(labels)
    planes = np.array([(where[0].start, where[1].start) for where in blobs.slices], dtype=np.intp)
    rows = np.rint(np.bincount(labels, weights=row) / sizes).astype(np.intp)
    columns = np.rint(np.bincount(labels, weights=column) / sizes).astype(np.intp)
    return (planes[:, 0], planes[:, 1]), rows, columns


@lru_cache(maxsize=1)
def _templates() -> Floats:
    """Render the coverage of every shape, radius and sub-pixel position, as (kinds, T, window * window)."""
    stacks = [
        [_template(kind, float(radius), dx, dy) for radius, dx, dy in product(_RADII, _OFFSETS, _OFFSETS)]
        for kind in SHAPES
    ]
    return np.array(stacks, dtype=np.float32).reshape(len(SHAPES), -1, _WINDOW * _WINDOW)


def _template(kind: str, radius: float, dx: float, dy: float) -> Floats:
    """Render one shape, cut out around the pixel nearest to its centroid as in `_windows`."""
    color = _COLOR_NAMES[0]
    centre = SCENE_SIZE / 2
    image = draw_scene(Scene((Placed(kind, color, centre + dx, centre + dy, radius),), background=0))
    coverage = image[:, :, 0].astype(np.float32) / np.float32(COLORS[color][0])
    row, column = (int(np.rint(c)) for c in np.argwhere(coverage > 0.5).mean(0))
    return np.pad(coverage, _HALF)[row : row + _WINDOW, column : column + _WINDOW]


def _match(windows: Floats) -> tuple[Ints, Floats]:
    """Find the best kind of each window and its fit: the soft intersection over union with a render."""
    templates = _templates()
    kinds, number, pixels = templates.shape
    flat = templates.reshape(-1, pixels)
    # |a - t|^2 without |a|^2, which does not change which render is nearest.
    distances = (flat**2).sum(1) - 2.0 * windows @ flat.T
    nearest = distances.reshape(-1, kinds, number).argmin(2)
    best = templates[np.arange(kinds)[None], nearest]
    both = np.minimum(best, windows[:, None]).sum(2)
    either = np.maximum(best, windows[:, None]).sum(2)
    fits: Floats = both / np.maximum(either, 1e-6)
    kind: Ints = fits.argmax(1)
    return kind, fits[np.arange(len(windows)), kind]
