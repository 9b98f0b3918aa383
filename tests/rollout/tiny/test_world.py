"""The synthetic world: what its prompts say is what its scenes show."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from rollout.prompts import load_prompts
from rollout.tiny import prompt_files
from rollout.tiny.build import WORLDS
from rollout.tiny.prompt_files import FOLDER, HELD_OUT, split_scenes, split_words, word_line
from rollout.tiny.vocabulary import WORDS, build_tokenizer
from rollout.tiny.world import (
    COLORS,
    LETTERS,
    PLURALS,
    RELATIONS,
    SCENE_SIZE,
    SHAPES,
    Scene,
    corrupt,
    corrupt_word,
    draw_scene,
    draw_word,
    scene_for,
    scene_prompts,
)

LINES = list(scene_prompts())
SEEDS = st.integers(0, 2**31)
SPLITS = {"shapes": split_scenes(), "words": split_words()}


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_prompts_are_in_genevals_format() -> None:
    for line in LINES:
        assert line["tag"] in HELD_OUT
        assert line["prompt"].startswith("a photo of ")
        for item in [*line["include"], *line.get("exclude", [])]:
            assert item["class"] in SHAPES
            assert item["count"] >= 1
            assert item.get("color", "red") in COLORS
            relation, target = item.get("position", ("above", 0))
            assert relation in RELATIONS
            assert target == 0
    assert {line["tag"] for line in LINES} == set(HELD_OUT)


@pytest.mark.parametrize("line", LINES[::17], ids=lambda line: line["prompt"])
def test_the_prompt_names_what_the_metadata_asks_for(line: dict[str, Any]) -> None:
    words = line["prompt"].split()
    for item in line["include"]:
        assert (item["class"] if item["count"] == 1 else PLURALS[item["class"]]) in words
        assert item.get("color", words[0]) in words
        assert item.get("position", ["", 0])[0] in line["prompt"]
    if line["tag"] == "counting":
        (included,), (excluded,) = line["include"], line["exclude"]
        assert excluded == {"class": included["class"], "count": included["count"] + 1}


def test_every_prompt_is_said_once() -> None:
    assert len({line["prompt"] for line in LINES}) == len(LINES)


@pytest.mark.parametrize("task", sorted(SPLITS))
def test_train_and_held_out_prompts_are_disjoint(task: str) -> None:
    train, held = ([line["prompt"] for line in lines] for lines in SPLITS[task])
    assert not set(train) & set(held)
    assert len({*train, *held}) == len(train) + len(held)
    assert len(held) >= 32
    assert len(train) > len(held)


def test_every_category_is_trained_and_held_out() -> None:
    train, held = SPLITS["shapes"]
    assert {line["tag"] for line in train} == {line["tag"] for line in held} == set(HELD_OUT)


def test_words_have_three_letters_and_stand_in_quotes() -> None:
    for line in [*SPLITS["words"][0], *SPLITS["words"][1]]:
        assert len(line["text"]) == 3
        assert set(line["text"]) <= set(LETTERS)
        assert f'"{line["text"]}"' in line["prompt"]


@pytest.mark.parametrize("task", sorted(SPLITS))
def test_the_shipped_files_are_the_splits(task: str) -> None:
    for name, lines in zip(("train", "eval"), SPLITS[task], strict=True):
        found = load_prompts(FOLDER / f"{task}-{name}.jsonl")
        assert [{**prompt.metadata, "prompt": prompt.text} for prompt in found] == lines


def test_the_files_are_remade_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_files, "FOLDER", tmp_path / "prompts")
    prompt_files.main()
    made = {path.name: path.read_text() for path in (tmp_path / "prompts").iterdir()}
    assert made == {path.name: path.read_text() for path in FOLDER.iterdir()}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer(14)


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_world_is_one_token(tokenizer: CLIPTokenizer, word: str) -> None:
    begin, token, end = tokenizer(word).input_ids
    assert (begin, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode([token]).strip() == word


@pytest.mark.parametrize("task", sorted(SPLITS))
def test_every_prompt_fits(task: str) -> None:
    tokenizer = build_tokenizer(WORLDS[task].tokens)
    texts = [line["prompt"] for lines in SPLITS[task] for line in lines]
    texts += [line["prompt"] for line in LINES] if task == "shapes" else [word_line("zqx")["prompt"]]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    assert max(lengths) <= WORLDS[task].tokens
    assert tokenizer.unk_token_id not in {i for ids in tokenizer(texts).input_ids for i in ids[1:-1]}


def test_different_prompts_are_different_tokens(tokenizer: CLIPTokenizer) -> None:
    texts = [line["prompt"] for line in LINES]
    assert len({tuple(ids) for ids in tokenizer(texts).input_ids}) == len(texts)


def shown(scene: Scene) -> list[tuple[str, str]]:
    return [(shape.kind, shape.color) for shape in scene.shapes]


@given(st.sampled_from(LINES), SEEDS)
def test_a_scene_shows_what_its_line_asks_for(line: dict[str, Any], seed: int) -> None:
    scene = scene_for(line, rng(seed))
    assert len(scene.shapes) == sum(item["count"] for item in line["include"])
    for item in line["include"]:
        found = [color for kind, color in shown(scene) if kind == item["class"]]
        assert len(found) == item["count"]
        assert set(found) <= ({item["color"]} if "color" in item else set(COLORS))
        if "position" in item:
            first, second = scene.shapes
            dx, dy = RELATIONS[item["position"][0]]
            assert (second.x - first.x) * dx + (second.y - first.y) * dy > first.radius
            assert second.kind == item["class"]


@given(st.sampled_from(LINES), SEEDS)
def test_shapes_are_drawn_whole_apart_and_in_their_colour(line: dict[str, Any], seed: int) -> None:
    scene = scene_for(line, rng(seed))
    image = draw_scene(scene)
    assert image.shape == (SCENE_SIZE, SCENE_SIZE, 3)
    frame = np.concatenate([image[[0, -1]].reshape(-1, 3), image[:, [0, -1]].reshape(-1, 3)])
    assert (frame == scene.background).all()
    for shape in scene.shapes:
        expected = np.array(COLORS[shape.color]) * shape.brightness
        assert np.abs(image[int(shape.y), int(shape.x)] - expected).max() <= 1
    for i, one in enumerate(scene.shapes):
        for other in scene.shapes[:i]:
            apart = max(abs(one.x - other.x), abs(one.y - other.y))
            assert apart > one.radius + other.radius


@given(st.sampled_from(LINES), SEEDS)
def test_a_scene_comes_from_its_generator(line: dict[str, Any], seed: int) -> None:
    assert scene_for(line, rng(seed)) == scene_for(line, rng(seed))
    assert scene_for(line, rng(seed)) != scene_for(line, rng(seed + 1))


@given(st.sampled_from(LINES), SEEDS)
def test_corruption_without_chance_is_the_identity(line: dict[str, Any], seed: int) -> None:
    assert corrupt(line, 0.0, rng(seed)) == line


@given(st.sampled_from(LINES), SEEDS)
def test_certain_corruption_makes_every_attribute_wrong(line: dict[str, Any], seed: int) -> None:
    before = copy.deepcopy(line)
    wrong = corrupt(line, 1.0, rng(seed))
    assert line == before
    assert {**wrong, "include": 0} == {**line, "include": 0}
    for right, item in zip(line["include"], wrong["include"], strict=True):
        assert set(item) == set(right)
        assert item["class"] != right["class"]
        assert item["class"] in SHAPES
        if "color" in right:
            assert item["color"] != right["color"]
            assert item["color"] in COLORS
        if "position" in right:
            assert item["position"][0] != right["position"][0]
            assert item["position"][0] in RELATIONS
        assert (item["count"] != right["count"]) == (line["tag"] == "counting")
    scene_for(wrong, rng(seed))


@given(st.text(LETTERS, min_size=1, max_size=6), SEEDS)
def test_words_are_corrupted_letter_by_letter(word: str, seed: int) -> None:
    assert corrupt_word(word, 0.0, rng(seed)) == word
    wrong = corrupt_word(word, 1.0, rng(seed))
    assert all(a != b and b in LETTERS for a, b in zip(word, wrong, strict=True))


def test_corruption_has_the_given_share() -> None:
    generator = rng(0)
    words = [corrupt_word("cat", 0.3, generator) for _ in range(400)]
    changed = [a != b for word in words for a, b in zip("cat", word, strict=True)]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.04)


def test_different_words_look_different_and_fit_their_sign() -> None:
    images = {word: draw_word(word) for word in ("cat", "cot", "www", "iii")}
    assert len({image.tobytes() for image in images.values()}) == 4
    for image in images.values():
        assert image.shape == (16, 48, 3)
        assert (image[:, [0, -1]] > 230).all()
        assert image.min() < 100


def test_prompt_lines_are_json() -> None:
    assert json.loads(json.dumps(LINES)) == LINES
