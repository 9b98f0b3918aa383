"""Tests of the preprocessing for a CLIP: known or requested, never guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from PIL import Image

from rewards.scorers.clipscore import ClipScoreScorer
from rollout.records import Prompt
from tests.support.reward_models import INCEPTION, noise_images


def normalisation(clip: str, weights: Path | str, **options: Any) -> tuple[list[float], list[float]]:
    """The mean and spread that a scorer gives to its images."""
    scorer = ClipScoreScorer(clip=clip, clip_weights=str(weights), device="cpu", **options)
    last = scorer._clip._transform.transforms[-1]
    return [float(value) for value in last.mean], [float(value) for value in last.std]


@pytest.fixture
def lone(tiny_clip: Path, tmp_path: Path) -> Path:
    """A file of weights with nothing beside it."""
    return Path(shutil.copy(tiny_clip / "open_clip_model.safetensors", tmp_path))


HALVES = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


def test_a_file_of_an_architecture_with_another_mean_gets_that_mean(
    lone: Path, tiny_architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    siglip = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")
    assert siglip["mean"] == INCEPTION["mean"]  # and not OpenAI's
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_architecture, {"webli": siglip})
    assert normalisation(tiny_architecture, lone) == HALVES


def test_the_preprocessing_of_a_file_is_asked_for_where_nothing_says_it(
    lone: Path, tiny_architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = r"option clip_preprocess: expected the mean and standard .*, got None \(neither .* beside .*{}"
    with pytest.raises(OSError, match=refused.format(lone.name)):
        normalisation(tiny_architecture, lone)
    published = {
        tag: open_clip.get_pretrained_cfg("ViT-L-14", tag) for tag in ("openai", "laion2b_s32b_b82k")
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_architecture, published)
    with pytest.raises(OSError, match=rf"the published weights of {tiny_architecture} do not agree"):
        normalisation(tiny_architecture, lone)
    given = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    assert normalisation(tiny_architecture, lone, clip_preprocess=given) == (given["mean"], given["std"])


@pytest.mark.parametrize("name", ["open_clip_config.json", "preprocessor_config.json"])
def test_what_lies_beside_a_file_says_its_preprocessing(
    lone: Path, tiny_architecture: str, name: str
) -> None:
    hub = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "do_resize": True}
    ours = {"model_cfg": {}, "preprocess_cfg": {**INCEPTION, "size": [32, 32], "mode": "RGB"}}
    lone.with_name(name).write_text(json.dumps(ours if name.startswith("open") else hub))
    assert normalisation(tiny_architecture, lone) == HALVES
    lone.with_name(name).write_text("{}")
    with pytest.raises(OSError, match=rf"option clip_preprocess: .*{name}: mean"):
        normalisation(tiny_architecture, lone)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": [0.5, 0.5, 0.5]}, "std is missing"),
        ({**INCEPTION, "sdt": 1}, "unknown key sdt"),
        ({"mean": [0.5], "std": [0.5, 0.5, 0.5]}, r"mean\.1 is missing"),
    ],
)
def test_a_preprocessing_that_is_none_is_refused(
    given: dict[str, Any], message: str, tiny_clip: Path
) -> None:
    with pytest.raises(OSError, match=rf"option clip_preprocess: .*{message}"):
        ClipScoreScorer(clip=str(tiny_clip), clip_preprocess=given, device="cpu")


def test_images_are_fitted_as_published(lone: Path, tiny_architecture: str) -> None:
    given = {**INCEPTION, "resize_mode": "squash"}
    scorer = ClipScoreScorer(
        clip=tiny_architecture, clip_weights=str(lone), clip_preprocess=given, device="cpu"
    )
    wide = noise_images(1, height=32, width=64)
    squashed = np.asarray(Image.fromarray(wide[0]).resize((32, 32), Image.Resampling.BICUBIC))
    text = Prompt(index=0, text="a boat")
    exact = scorer(squashed[None], [text]).values
    np.testing.assert_allclose(scorer(wide, [text]).values, exact, atol=1e-3)
