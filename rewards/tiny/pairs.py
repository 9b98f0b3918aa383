"""Synthetic preferences in the bundled world: images of a caption and their utility.

An image's utility is highest if it shows what the caption asks for; of two that do so equally, the one with
larger and more vivid shapes on a darker, cleaner background is preferred.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rewards.models.detection import Detection
from rewards.scorers.geneval_rules import Rules, apply_rules
from rollout.tiny.prompt_files import split_scenes
from rollout.tiny.world import (
    COLORS,
    NUMBERS,
    PLURALS,
    SHAPES,
    Scene,
    corrupt,
    draw_scene,
    place,
    scene_for,
    scene_prompts,
)

RIGHT_WORTH: Final = 16.0
LOOKS_WORTH: Final = 3.8
"""Less than a quarter of `RIGHT_WORTH`, the least that a mistake costs: looks never outweigh a mistake."""
MOST_NOISE: Final = 14.0
MOST_BLUR: Final = 0.7
MOST_SHAPES: Final = 4
SCATTERED: Final = 0.35
"""Share of scenes, relations aside, in another layout than the world's."""
ROWS: Final = (8.5, 23.5)
"""Positions of scattered rows or columns, in pixels: far enough apart for the largest shapes."""

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """A caption and its images (G, 32, 32, 3) uint8, with their rightness (G,) and looks (G,), in 0..1."""

    caption: str
    tag: str
    images: NDArray[np.uint8]
    right: NDArray[np.float64]
    looks: NDArray[np.float64]

    @property
    def worth(self) -> NDArray[np.float64]:
        """The utility whose differences are the log-odds of preferring one image over another."""
        return RIGHT_WORTH * self.right + LOOKS_WORTH * self.looks


def lines(held_out: bool) -> list[Line]:
    """Return the held-out scene prompts, or all other prompts of the world and coloured counts.

    The world has only twelve counting prompts, three of them held out, which a model would learn by heart;
    counts such as "three red crosses" make it generalise.
    """
    held = split_scenes()[1]
    if held_out:
        return held
    texts = {line["prompt"] for line in held}
    return [line for line in (*scene_prompts(), *_colored_counts()) if line["prompt"] not in texts]


def _colored_counts() -> Iterator[Line]:
    for kind, color, count in product(SHAPES, COLORS, (2, 3, 4)):
        yield {
            "tag": "counting",
            "include": [{"class": kind, "count": count, "color": color}],
            "prompt": f"a photo of {NUMBERS[count]} {color} {PLURALS[kind]}",
        }


def choices(pool: Sequence[Line], rng: np.random.Generator) -> Iterator[Choice]:
    """Generate captions, every category equally often, each with two right and two wrong images."""
    by_tag: dict[str, list[Line]] = {}
    for line in pool:
        by_tag.setdefault(line["tag"], []).append(line)
    tags = list(by_tag)
    while True:
        members = by_tag[tags[int(rng.integers(len(tags)))]]
        line = members[int(rng.integers(len(members)))]
        scenes = [arranged(line, rng), arranged(line, rng), spoiled(line, rng), spoiled(line, rng)]
        yield _choice(line, scenes, rng)


def _choice(line: Line, scenes: Sequence[Scene], rng: np.random.Generator) -> Choice:
    noises = rng.uniform(0.0, MOST_NOISE, len(scenes))
    return Choice(
        caption=line["prompt"],
        tag=line["tag"],
        images=np.stack([photograph(s, noise, rng) for s, noise in zip(scenes, noises, strict=True)]),
        right=np.array([rightness(scene, line) for scene in scenes]),
        looks=np.array([looks(s, noise) for s, noise in zip(scenes, noises, strict=True)]),
    )


def spoiled(line: Line, rng: np.random.Generator) -> Scene:
    """Make a scene that violates the line: a wrong attribute, or a shape missing or too many."""
    while True:
        scene = _spoil(line, rng)
        if rightness(scene, line) < 1.0:
            return scene


def _spoil(line: Line, rng: np.random.Generator) -> Scene:
    how = rng.random()
    if how < 0.7:
        return arranged(corrupt(line, 0.5, rng), rng)
    if how < 0.8 or _total(line["include"]) == MOST_SHAPES:
        scene = arranged(line, rng)
        return replace(scene, shapes=scene.shapes[:-1])
    extra = {"class": str(rng.choice(SHAPES)), "count": 1}
    return arranged({**line, "include": [*line["include"], extra]}, rng)


def arranged(line: Line, rng: np.random.Generator) -> Scene:
    """Make a scene that satisfies the line, in the world's layout or scattered where its relation allows it.

    Diffusion models deviate from the layout of their training data, which GenEval's rules accept.
    """
    scene = scene_for(line, rng)
    while rng.random() < SCATTERED:
        kinds, colors = [shape.kind for shape in scene.shapes], [shape.color for shape in scene.shapes]
        moved = place(kinds, colors, _scattered(len(kinds), rng), rng)
        if rightness(moved, line) >= rightness(scene, line):
            return moved
    return scene


def _scattered(count: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Choose spots in two rows or two columns; a spot alone in its row is anywhere along it."""
    near, far = ROWS
    corners = rng.permutation([(x, y) for x in ROWS for y in ROWS])[:count]
    rows = [float(y) for _, y in corners]
    spots = [
        (float(x) if rows.count(y) > 1 else float(rng.uniform(near, far)), y)
        for (x, _), y in zip(corners, rows, strict=True)
    ]
    return spots if rng.random() < 0.5 else [(y, x) for x, y in spots]


def rightness(scene: Scene, line: Line) -> float:
    """Compute the scene's own soft score by GenEval's rules, less a quarter per surplus shape."""
    found = [
        Detection(
            kind=shape.kind,
            confidence=1.0,
            box=(
                shape.x - shape.radius,
                shape.y - shape.radius,
                shape.x + shape.radius,
                shape.y + shape.radius,
            ),
            color=shape.color,
        )
        for shape in scene.shapes
    ]
    surplus = max(0, len(scene.shapes) - _total(line["include"]))
    return max(0.0, apply_rules(found, line, Rules()).soft - 0.25 * surplus)


def _total(include: Sequence[Line]) -> int:
    return sum(int(item["count"]) for item in include)


def looks(scene: Scene, noise: float) -> float:
    """Rate a scene's looks in 0..1, by size, brightness, dark background and cleanness.

    Their mean m is stretched about its middle, where most scenes are: 6 m^5 - 15 m^4 + 10 m^3.
    """
    if not scene.shapes:
        return 0.0
    size = (float(np.mean([shape.radius for shape in scene.shapes])) - 4.4) / 2.2
    brightness = (float(np.mean([shape.brightness for shape in scene.shapes])) - 0.65) / 0.35
    darkness = (72 - scene.background) / 64
    m = float(np.mean(np.clip([size, brightness, darkness, 1 - noise / MOST_NOISE], 0.0, 1.0)))
    return m**3 * (m * (6 * m - 15) + 10)


def photograph(scene: Scene, noise: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Render a scene with some blur and Gaussian noise of the given deviation, as a diffusion model might."""
    blur = rng.uniform(0.0, MOST_BLUR)
    pixels: NDArray[np.float32] = ndimage.gaussian_filter(
        draw_scene(scene).astype(np.float32), (blur, blur, 0.0)
    )
    return np.clip(np.rint(pixels + rng.normal(0.0, noise, pixels.shape)), 0, 255).astype(np.uint8)
