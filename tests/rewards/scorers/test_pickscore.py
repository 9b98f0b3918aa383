from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from rewards.scorer import Scorer
from rewards.scorers import pickscore
from rewards.scorers.geneval_rules import RELATIONS, Rules, apply_rules, relations
from rewards.scorers.pickscore import SCALE, PickScoreScorer
from rewards.tiny import train_preference
from rewards.tiny.pairs import (
    LOOKS_WORTH,
    RIGHT_WORTH,
    Choice,
    arranged,
    choices,
    lines,
    looks,
    rightness,
    spoiled,
)
from rewards.tiny.train_preference import (
    FOLDER,
    Recipe,
    accuracy,
    bradley_terry,
    build_model,
    build_processor,
)
from rollout.records import Prompt
from rollout.tiny.vocabulary import build_tokenizer
from rollout.tiny.world import SCENE_SIZE, Placed, Scene, draw_scene, scene_for

Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def random_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights in the real format."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(16)
    build_model(tokenizer).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(random_clip: Path) -> PickScoreScorer:
    return PickScoreScorer(model=str(random_clip), processor=str(random_clip), device="cpu")


@pytest.fixture(scope="module")
def shipped() -> PickScoreScorer:
    return PickScoreScorer(model=str(FOLDER), processor=str(FOLDER), device="cpu")


@pytest.fixture(scope="module")
def held_out() -> list[Choice]:
    return list(islice(choices(lines(held_out=True), np.random.default_rng(99)), 300))


def noise_images(count: int, size: int = 32) -> Images:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(index=i, text=text) for i, text in enumerate(texts)]


TEXTS = ("a photo of a red circle", "a photo of two squares", "a photo of a red circle")


def test_it_is_the_formula(scorer: PickScoreScorer, random_clip: Path) -> None:
    images = noise_images(3)
    model = CLIPModel.from_pretrained(random_clip).eval()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    tokens = build_tokenizer(16)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(pixel_values=pixels, **tokens).logits_per_image
    judgement = scorer(images, prompts(*TEXTS))
    np.testing.assert_allclose(judgement.values, logits.diagonal().numpy() / SCALE, atol=1e-5)
    assert judgement.values.dtype == np.float64
    assert judgement.valid.all()


def test_bfloat16_is_near_and_keeps_the_scale(
    scorer: PickScoreScorer, random_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickscore, "placed", lambda device: (torch.device("cpu"), torch.bfloat16))
    reduced = PickScoreScorer(model=str(random_clip), processor=str(random_clip))
    assert reduced._model.dtype == torch.bfloat16
    assert reduced._scale == scorer._scale
    near, exact = (made(noise_images(3), prompts(*TEXTS)).values for made in (reduced, scorer))
    np.testing.assert_allclose(near, exact, atol=0.02 * scorer._scale)
    assert near.tolist() != exact.tolist()


def test_each_pair_is_scored_alone(scorer: PickScoreScorer) -> None:
    images = noise_images(3)
    together = scorer(images, prompts(*TEXTS)).values
    alone = [scorer(images[i : i + 1], prompts(TEXTS[i])).values[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_repeated_prompt_is_encoded_once(scorer: PickScoreScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[list[str]] = []
    encode = scorer._encode_texts
    monkeypatch.setattr(scorer, "_encode_texts", lambda texts: encoded.append(texts) or encode(texts))
    scorer(noise_images(3), prompts(*TEXTS))
    assert encoded == [[TEXTS[0], TEXTS[1]]]


def test_large_images_and_long_prompts_are_taken(scorer: PickScoreScorer) -> None:
    judgement = scorer(noise_images(2, size=96), prompts("a photo of " * 40, "x"))
    assert np.isfinite(judgement.values).all()
    assert judgement.valid.all()


def test_a_model_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path / "none")):
        PickScoreScorer(model=str(tmp_path / "none"), processor=str(tmp_path / "none"))


def test_a_model_with_a_part_missing_is_refused(random_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_clip, tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"option model: .*not in the checkpoint, such as visual_projection"):
        PickScoreScorer(model=str(folder), processor=str(random_clip))


def test_prompts_need_a_text(scorer: PickScoreScorer) -> None:
    assert isinstance(scorer, Scorer)
    PickScoreScorer.check(prompts("x")[0])
    with pytest.raises(ValueError, match=r"^expected a text, got ' '"):
        PickScoreScorer.check(prompts(" ")[0])


def scores_of(model: PickScoreScorer, held: list[Choice]) -> NDArray[np.float64]:
    """(captions, images) scores; the first two images of a caption are right, the others wrong."""
    captions = [choice.caption for choice in held for _ in choice.right]
    images = np.concatenate([choice.images for choice in held])
    return model(images, prompts(*captions)).values.reshape(len(held), -1)


def test_the_shipped_model_prefers_what_was_asked_for(
    shipped: PickScoreScorer, held_out: list[Choice]
) -> None:
    scores = scores_of(shipped, held_out)
    won = scores[:, :2, None] > scores[:, None, 2:]
    single = [choice.tag in ("single_object", "colors") for choice in held_out]
    assert won.mean() >= 0.90
    assert won[single].mean() >= 0.95
    assert 0.05 <= np.median(scores[:, :2, None] - scores[:, None, 2:]) <= 2.0


def test_the_shipped_model_prefers_good_looks_among_right_ones(
    shipped: PickScoreScorer, held_out: list[Choice]
) -> None:
    scores = scores_of(shipped, held_out)
    gaps = np.array([choice.looks[0] - choice.looks[1] for choice in held_out])
    clear = np.abs(gaps) >= train_preference.LOOKS_GAP
    assert np.mean((scores[clear, 0] - scores[clear, 1]) * gaps[clear] > 0) >= 0.8


def test_the_caption_decides(shipped: PickScoreScorer) -> None:
    red = draw_scene(Scene((Placed("circle", "red", 16.0, 16.0, 5.5),)))
    blue = draw_scene(Scene((Placed("circle", "blue", 16.0, 16.0, 5.5),)))
    texts = ("a photo of a red circle", "a photo of a blue circle")
    scores = shipped(np.stack([red, red, blue, blue]), prompts(*texts, *texts)).values
    assert scores[0] > scores[1]
    assert scores[3] > scores[2]


def test_the_shipped_model_is_small_and_complete() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4 * 2**20
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in FOLDER.iterdir()}
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "clip"


def test_pairs_hold_what_they_say() -> None:
    rng = np.random.default_rng(0)
    for choice in islice(choices(lines(held_out=False), rng), 60):
        assert choice.images.shape == (4, 32, 32, 3)
        assert (choice.right[:2] == 1.0).all()
        assert (choice.right[2:] <= 0.75).all()
        assert choice.worth[:2].min() > choice.worth[2:].max()
        assert ((choice.looks >= 0) & (choice.looks <= 1)).all()
    assert LOOKS_WORTH < 0.25 * RIGHT_WORTH


def test_held_out_prompts_are_held_out() -> None:
    held, rest = ({line["prompt"] for line in lines(held_out=flag)} for flag in (True, False))
    assert held
    assert not held & rest


def test_rightness_is_the_soft_score_of_the_rules() -> None:
    rng = np.random.default_rng(0)
    for line in lines(held_out=True):
        assert rightness(scene_for(line, rng), line) == 1.0
        assert rightness(spoiled(line, rng), line) < 1.0
        assert rightness(Scene(()), line) == apply_rules([], line, Rules()).soft


def test_right_scenes_stand_in_every_arrangement() -> None:
    rng = np.random.default_rng(0)
    line = next(line for line in lines(held_out=False) if line["tag"] == "two_object")
    seen: set[str] = set()
    for _ in range(100):
        scene = arranged(line, rng)
        assert rightness(scene, line) == 1.0
        first, second = ((shape.x, shape.y) for shape in scene.shapes)
        seen |= relations((*first, *first), (*second, *second), 0.0)
    assert seen == set(RELATIONS)


def test_shapes_keep_apart_and_inside() -> None:
    rng = np.random.default_rng(0)
    pool = lines(held_out=True)
    for line in pool * 6:
        for scene in (arranged(line, rng), spoiled(line, rng)):
            for shape in scene.shapes:
                assert shape.radius <= min(shape.x, shape.y)
                assert max(shape.x, shape.y) <= SCENE_SIZE - shape.radius
            for a, b in combinations(scene.shapes, 2):
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


def test_a_spoiled_scene_may_hold_a_shape_too_many() -> None:
    rng = np.random.default_rng(0)
    line = lines(held_out=False)[0]
    counts = {len(spoiled(line, rng).shapes) for _ in range(100)}
    assert line["tag"] == "single_object"
    assert counts == {0, 1, 2}


def test_looks_grow_with_size_brightness_and_cleanness() -> None:
    plain = Scene((Placed("circle", "red", 8.0, 8.0, 5.0, 0.8),), background=40)
    best = looks(Scene((Placed("circle", "red", 8.0, 8.0, 6.6, 1.0),), background=8), 0.0)
    assert looks(Scene(()), 0.0) == 0.0 < looks(plain, 4.0) < looks(plain, 0.0) < best == pytest.approx(1.0)


def test_bradley_terry_is_least_when_scores_are_worths() -> None:
    worth = torch.tensor([[0.0, 1.0, 3.0], [2.0, -1.0, 0.5]])
    at_worth = bradley_terry(worth, worth)
    assert bradley_terry(worth + 7.0, worth).item() == pytest.approx(at_worth.item())
    for other in (2 * worth, -worth, torch.zeros_like(worth)):
        assert bradley_terry(other, worth) > at_worth


def test_training_makes_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_preference, "Recipe", partial(Recipe, bank=8, batch=4))
    monkeypatch.setattr(train_preference, "accuracy", partial(accuracy, count=100))
    monkeypatch.setattr("sys.argv", ["train_preference", "--steps", "3", "--folder", str(tmp_path)])
    threads = torch.get_num_threads()
    train_preference.main()
    torch.set_num_threads(threads)
    made = PickScoreScorer(model=str(tmp_path), processor=str(tmp_path), device="cpu")
    assert made(noise_images(3), prompts(*TEXTS)).valid.all()


def test_a_model_of_ones_own_brings_its_own_preprocessing(random_clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "another"
    shutil.copytree(random_clip, folder)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"].update(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    path.write_text(json.dumps(config))
    found = PickScoreScorer(model=str(folder), device="cpu")._processor.image_processor
    assert (list(found.image_mean), list(found.image_std)) == ([0.5] * 3, [0.25] * 3)
    path.unlink()
    with pytest.raises(OSError, match=rf"option processor: expected a CLIP processor .*{folder}"):
        PickScoreScorer(model=str(folder), device="cpu")
