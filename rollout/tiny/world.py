"""The synthetic world of the bundled models: scenes of coloured shapes, and short words.

A scene has one to four shapes in a fixed layout with some jitter, drawn at 32 x 32 pixels. Prompts
follow GenEval's six categories and its metadata format (https://github.com/djghosh13/geneval), with
shapes as the object classes. Words are three letters drawn at 48 x 16 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SHAPES: Final = ("circle", "square", "triangle", "cross")
COLORS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (235, 45, 45),
    "yellow": (245, 220, 50),
    "green": (50, 200, 75),
    "blue": (55, 95, 245),
    "purple": (175, 65, 225),
}
RELATIONS: Final[dict[str, tuple[int, int]]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
NUMBERS: Final = ("zero", "one", "two", "three", "four")
PLURALS: Final = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
SCENE_SIZE: Final = 32
WORD_SIZE: Final = (48, 16)
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
_ZOOM: Final = 4


@dataclass(frozen=True, slots=True)
class Placed:
    """One shape of a scene; centre and radius in pixels, brightness a factor of the palette's colour."""

    kind: str
    color: str
    x: float
    y: float
    radius: float
    brightness: float = 1.0


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes on a grey background (0 is black, 255 is white)."""

    shapes: tuple[Placed, ...]
    background: int = 24


def _outline(shape: Placed) -> list[tuple[float, float]]:
    x, y, r = shape.x * _ZOOM, shape.y * _ZOOM, shape.radius * _ZOOM
    if shape.kind == "square":
        s = 0.9 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape.kind == "triangle":
        return [(x, y - r), (x + r, y + 0.9 * r), (x - r, y + 0.9 * r)]
    a = 0.34 * r
    return [
        (x - a, y - r), (x + a, y - r), (x + a, y - a), (x + r, y - a), (x + r, y + a), (x + a, y + a),
        (x + a, y + r), (x - a, y + r), (x - a, y + a), (x - r, y + a), (x - r, y - a), (x - a, y - a),
    ]  # fmt: skip


def draw_scene(scene: Scene) -> NDArray[np.uint8]:
    """Render a scene as a (32, 32, 3) uint8 image, antialiased."""
    size = SCENE_SIZE * _ZOOM
    canvas = Image.new("RGB", (size, size), (scene.background,) * 3)
    pen = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        r, g, b = (round(c * shape.brightness) for c in COLORS[shape.color])
        if shape.kind == "circle":
            x, y, radius = shape.x * _ZOOM, shape.y * _ZOOM, shape.radius * _ZOOM
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(r, g, b))
        else:
            pen.polygon(_outline(shape), fill=(r, g, b))
    return np.asarray(canvas.resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BOX))


def draw_word(word: str) -> NDArray[np.uint8]:
    """Render a word as a (16, 48, 3) uint8 image: dark letters on a light ground."""
    width, height = WORD_SIZE
    canvas = Image.new("RGB", (width * _ZOOM, height * _ZOOM), (245, 245, 240))
    font = ImageFont.load_default(size=14 * _ZOOM)
    ImageDraw.Draw(canvas).text(
        (width * _ZOOM / 2, height * _ZOOM / 2), word.upper(), fill=(20, 24, 40), font=font, anchor="mm"
    )
    return np.asarray(canvas.resize(WORD_SIZE, Image.Resampling.BOX))


def place(
    kinds: list[str], colors: list[str], spots: Sequence[tuple[float, float]], rng: np.random.Generator
) -> Scene:
    """Put shapes at spots (x, y in pixels) with random size, brightness and jitter."""
    shapes = []
    for kind, color, (x, y) in zip(kinds, colors, spots, strict=True):
        radius, brightness = float(rng.uniform(4.4, 6.6)), float(rng.uniform(0.65, 1.0))
        dx, dy = (float(shift) for shift in rng.uniform(-0.8, 0.8, size=2))
        shapes.append(Placed(kind, color, x + dx, y + dy, radius, brightness))
    return Scene(tuple(shapes), int(rng.integers(8, 72)))


def _item(kind: str, count: int = 1, **extra: Any) -> dict[str, Any]:
    return {"class": kind, "count": count, **extra}


def _line(tag: str, prompt: str, include: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
    return {"tag": tag, "include": include, **extra, "prompt": f"a photo of {prompt}"}


def scene_prompts() -> Iterator[dict[str, Any]]:
    """Generate every prompt of the world, in GenEval's metadata format and a fixed order."""
    for kind in SHAPES:
        yield _line("single_object", f"a {kind}", [_item(kind)])
    for a, b in permutations(SHAPES, 2):
        yield _line("two_object", f"a {a} and a {b}", [_item(a), _item(b)])
    for kind, count in product(SHAPES, (2, 3, 4)):
        text = f"{NUMBERS[count]} {PLURALS[kind]}"
        yield _line("counting", text, [_item(kind, count)], exclude=[_item(kind, count + 1)])
    for color, kind in product(COLORS, SHAPES):
        yield _line("colors", f"a {color} {kind}", [_item(kind, color=color)])
    for relation, (a, b) in product(RELATIONS, permutations(SHAPES, 2)):
        yield _line("position", f"a {b} {relation} a {a}", [_item(a), _item(b, position=[relation, 0])])
    for (a, b), (p, q) in product(permutations(SHAPES, 2), permutations(COLORS, 2)):
        yield _line("color_attr", f"a {p} {a} and a {q} {b}", [_item(a, color=p), _item(b, color=q)])


def scene_for(line: dict[str, Any], rng: np.random.Generator) -> Scene:
    """Draw a random scene that satisfies a prompt line, with free attributes at random.

    Two shapes are side by side, the first one on the left, unless the line has another relation.
    """
    kinds: list[str] = []
    colors: list[str] = []
    for item in line["include"]:
        color = item.get("color") or str(rng.choice(list(COLORS)))
        kinds += [item["class"]] * item["count"]
        colors += [color] * item["count"]
    relation = next((item["position"][0] for item in line["include"] if "position" in item), "right of")
    return place(kinds, colors, _spots(len(kinds), relation), rng)


def _spots(count: int, relation: str) -> list[tuple[float, float]]:
    """Return the centres of shapes; of two, the second is in the relation to the first."""
    near, middle, far = 8.5, 16.0, 23.5
    if count == 1:
        return [(middle, middle)]
    if count == 2:
        dx, dy = RELATIONS[relation]
        return [(middle - 7.5 * dx, middle - 7.5 * dy), (middle + 7.5 * dx, middle + 7.5 * dy)]
    upper = [(near, near), (far, near)]
    return [*upper, (middle, far)] if count == 3 else [*upper, (near, far), (far, far)]


def corrupt(line: dict[str, Any], chance: float, rng: np.random.Generator) -> dict[str, Any]:
    """Replace each attribute of a line by a wrong one with the given chance.

    The scene of the result is then paired with the *original* caption, from which the bundled model learns
    to be right only some of the time.
    """
    include = []
    for item in line["include"]:
        wrong = dict(item)
        wrong["class"] = _other(item["class"], SHAPES, chance, rng)
        if "color" in item:
            wrong["color"] = _other(item["color"], tuple(COLORS), chance, rng)
        if "position" in item:
            wrong["position"] = [_other(item["position"][0], tuple(RELATIONS), chance, rng), 0]
        if line["tag"] == "counting":
            wrong["count"] = int(_other(str(item["count"]), ("1", "2", "3", "4"), chance, rng))
        include.append(wrong)
    return {**line, "include": include}


def corrupt_word(word: str, chance: float, rng: np.random.Generator) -> str:
    """Replace each letter of a word by another one with the given chance."""
    return "".join(_other(letter, tuple(LETTERS), chance, rng) for letter in word)


def _other(value: str, choices: tuple[str, ...], chance: float, rng: np.random.Generator) -> str:
    if rng.random() >= chance:
        return value
    return str(rng.choice([c for c in choices if c != value]))
