"""Images to try a reward on: blank, noise, and drawings of prompts where possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from rewards.scorers.geneval_rules import check_metadata
from rewards.scorers.ocr import target_text
from rollout.records import Prompt
from rollout.tiny.world import COLORS, SHAPES, draw_scene, scene_for

_SCENE: Final = {"include": [{"class": "circle", "count": 1, "color": "red"}]}
_ZOOM: Final = 4


def plain(size: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Make a blank and a noise image (height, width, 3)."""
    shape = (size[1], size[0], 3)
    return np.full(shape, 127, np.uint8), np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def picture(prompt: Prompt, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw a prompt as a (height, width, 3) image, if it is of the bundled world or asks for a text.

    Any other prompt gets a red circle, which at least is a real image.
    """
    try:
        return _sign(target_text(prompt), size)
    except ValueError:
        pass
    scene: Mapping[str, Any] = prompt.metadata
    try:
        check_metadata(scene, SHAPES, COLORS)
    except ValueError:
        scene = _SCENE
    drawn = Image.fromarray(draw_scene(scene_for(dict(scene), np.random.default_rng(0))))
    return np.asarray(ImageOps.pad(drawn, size))


def _sign(text: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw a text across the whole image."""
    width, height = (length * _ZOOM for length in size)
    canvas = Image.new("RGB", (width, height), (245, 245, 240))
    font = ImageFont.load_default(size=min(0.88 * height, 1.2 * width / len(text)))
    middle = (width / 2, height / 2)
    ImageDraw.Draw(canvas).text(middle, text.upper(), fill=(20, 24, 40), font=font, anchor="mm")
    return np.asarray(canvas.resize(size, Image.Resampling.BOX))
