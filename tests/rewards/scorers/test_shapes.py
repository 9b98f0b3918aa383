from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from rewards.scorer import RewardError, Scorer
from rewards.scorers.shapes import RULES, ShapesScorer, detect
from rollout.records import Prompt
from rollout.tiny.world import (
    COLORS,
    SHAPES,
    Placed,
    Scene,
    corrupt,
    draw_scene,
    place,
    scene_for,
    scene_prompts,
)

Line = dict[str, Any]
LINES = list(scene_prompts())
CORNERS = [(8.5, 8.5), (23.5, 8.5), (8.5, 23.5), (23.5, 23.5)]


def prompt(line: Line) -> Prompt:
    return Prompt(index=0, text=line["prompt"], metadata=line)


def photographs(scenes: Sequence[Scene], noise: float, blur: float, seed: int = 0) -> NDArray[np.uint8]:
    pixels = np.stack([draw_scene(scene) for scene in scenes]).astype(np.float64)
    pixels = ndimage.gaussian_filter(pixels, (0, blur, blur, 0))
    pixels += np.random.default_rng(seed).normal(0, noise, pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def right_scenes(count: int) -> tuple[list[Line], list[Scene]]:
    """Every category equally often, since colour pairs would otherwise crowd out the rest."""
    rng = np.random.default_rng(1)
    by_tag = {line["tag"]: [other for other in LINES if other["tag"] == line["tag"]] for line in LINES}
    groups = list(by_tag.values())
    lines = [groups[i % len(groups)][int(rng.integers(len(groups[i % len(groups)])))] for i in range(count)]
    return lines, [scene_for(line, rng) for line in lines]


@pytest.mark.parametrize(
    ("noise", "blur", "least"), [(0, 0, 0.99), (8, 0, 0.99), (12, 0, 0.98), (0, 0.7, 0.99), (8, 0.7, 0.98)]
)
def test_right_scenes_are_right_through_noise_and_blur(noise: float, blur: float, least: float) -> None:
    lines, scenes = right_scenes(480)
    judgement = ShapesScorer()(photographs(scenes, noise, blur), [prompt(line) for line in lines])
    assert judgement.valid.all()
    assert judgement.details["strict"].mean() >= least
    assert judgement.values.mean() >= least


def test_every_prompt_of_the_world_is_satisfied_by_its_scene() -> None:
    rng = np.random.default_rng(2)
    images = np.stack([draw_scene(scene_for(line, rng)) for line in LINES])
    judgement = ShapesScorer()(images, [prompt(line) for line in LINES])
    assert judgement.details["strict"].mean() >= 0.99


def content(scene: Scene) -> list[tuple[str, str]]:
    return sorted((shape.kind, shape.color) for shape in scene.shapes)


def test_wrong_scenes_score_less_than_one() -> None:
    rng = np.random.default_rng(3)
    lines, images = [], []
    while len(lines) < 300:
        line = LINES[int(rng.integers(len(LINES)))]
        wrong = corrupt(line, 0.6, rng)
        asked = {(item["class"], item["count"], item.get("color")) for item in line["include"]}
        shown = {(item["class"], item["count"], item.get("color")) for item in wrong["include"]}
        if asked != shown:
            lines.append(line)
            images.append(draw_scene(scene_for(wrong, rng)))
    judgement = ShapesScorer()(np.stack(images), [prompt(line) for line in lines])
    assert np.mean(judgement.values < 1.0) >= 0.99
    assert judgement.details["strict"].mean() <= 0.01


@pytest.mark.parametrize("brightness", [0.5, 0.65, 1.0])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_one_shape_is_found_where_it_is(kind: str, color: str, brightness: float) -> None:
    shape = Placed(kind, color, 11.3, 20.6, 5.2, brightness)
    [[found]] = detect(draw_scene(Scene((shape,), 40))[None])
    assert (found.kind, found.color) == (kind, color)
    assert found.confidence > RULES.threshold
    centre = (found.box[0] + found.box[2]) / 2, (found.box[1] + found.box[3]) / 2
    assert np.allclose(centre, (11.3, 20.6), atol=1.0)


def test_neighbours_of_one_color_are_told_apart() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        kinds = [str(kind) for kind in rng.choice(SHAPES, 4)]
        scene = place(kinds, ["blue"] * 4, CORNERS, rng)
        [found] = detect(draw_scene(scene)[None])
        assert sorted((d.kind, d.color or "") for d in found) == content(scene)


def drawn(paint: Any) -> NDArray[np.uint8]:
    canvas = Image.new("RGB", (128, 128), (24, 24, 24))
    paint(ImageDraw.Draw(canvas))
    return np.asarray(canvas.resize((32, 32), Image.Resampling.BOX))


@pytest.mark.parametrize(
    "paint",
    [
        lambda pen: pen.pieslice((40, 40, 88, 88), 0, 180, fill=COLORS["red"]),
        lambda pen: pen.ellipse((40, 40, 88, 88), outline=COLORS["red"], width=8),
        lambda pen: pen.polygon([(64, 88), (40, 42), (88, 42)], fill=COLORS["red"]),
        lambda pen: pen.rectangle((20, 52, 108, 70), fill=COLORS["red"]),
        lambda pen: pen.ellipse((40, 40, 88, 88), fill=(150, 150, 150)),
        lambda pen: pen.ellipse((60, 60, 66, 66), fill=COLORS["red"]),
    ],
    ids=["half disc", "ring", "upside-down triangle", "bar", "grey disc", "dot"],
)
def test_what_is_no_shape_does_not_count(paint: Any) -> None:
    [found] = detect(drawn(paint)[None])
    assert all(detection.confidence < RULES.threshold for detection in found)


def test_noise_and_flat_images_hold_nothing() -> None:
    noise = np.random.default_rng(5).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    flat = np.full((2, 32, 32, 3), 30, dtype=np.uint8)
    for found in detect(np.concatenate([noise, flat])):
        assert all(detection.confidence < RULES.threshold for detection in found)


def test_images_are_judged_alone() -> None:
    lines, scenes = right_scenes(24)
    images = photographs(scenes, 6, 0.4)
    prompts = [prompt(line) for line in lines]
    together = ShapesScorer()(images, prompts)
    alone = [ShapesScorer()(images[i : i + 1], prompts[i : i + 1]).values[0] for i in range(24)]
    assert together.values.tolist() == alone


def test_another_image_size_is_an_error() -> None:
    with pytest.raises(RewardError, match=r"expected \(N, 32, 32, 3\) images, got \(1, 16, 48, 3\)"):
        detect(np.zeros((1, 16, 48, 3), dtype=np.uint8))


def test_prompts_are_checked_against_the_world() -> None:
    assert isinstance(ShapesScorer(), Scorer)
    for line in LINES:
        ShapesScorer.check(prompt(json.loads(json.dumps(line))))
    with pytest.raises(ValueError, match=r"class: expected one of circle, .*, got 'cat'"):
        ShapesScorer.check(prompt({"tag": "colors", "prompt": "", "include": [{"class": "cat", "count": 1}]}))
