from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rewards.models import ocr_weights
from rewards.models.ocr_weights import RECOGNITION, model_folders
from rewards.scorers import ocr
from rewards.scorers.ocr import OcrScorer, in_reading_order, normalize, similarity, target_text
from rollout.records import Prompt
from rollout.tiny.world import draw_word

Images = NDArray[np.uint8]
WORDS = (
    "ace",
    "bag",
    "cow",
    "dew",
    "elf",
    "fox",
    "gum",
    "hut",
    "ivy",
    "jam",
    "key",
    "lid",
    "mud",
    "nut",
    "oak",
    "pie",
)


def prompt(text: str, /, **metadata: Any) -> Prompt:
    return Prompt(index=3, text=text, metadata=metadata)


def signs(words: tuple[str, ...] = WORDS) -> list[Prompt]:
    return [prompt(f'a sign that says "{word}"') for word in words]


def pictures(words: tuple[str, ...] = WORDS) -> Images:
    return np.stack([draw_word(word) for word in words])


def page(*texts: tuple[int, int, str]) -> Images:
    canvas = Image.new("RGB", (512, 256), (240, 240, 240))
    for x, y, text in texts:
        ImageDraw.Draw(canvas).text((x, y), text, fill=(0, 0, 0), font=ImageFont.load_default(size=48))
    return np.asarray(canvas)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOISEMARGIN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def scorer(cache: Path) -> OcrScorer:
    return OcrScorer()


@pytest.fixture(scope="module")
def padded(cache: Path) -> Callable[[Images], list[str]]:
    """PaddleOCR's own recogniser, which pads every line to 320 columns."""
    os.environ["PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK"] = "True"
    from paddleocr import TextRecognition

    model = TextRecognition(
        model_name=RECOGNITION,
        model_dir=str(model_folders()[RECOGNITION]),
        engine="onnxruntime",
        device="cpu",
        engine_config={"intra_op_num_threads": 1, "inter_op_num_threads": 1},
    )
    return lambda images: [r["rec_text"] for r in model.predict(list(images[..., ::-1]), batch_size=16)]


def test_words_are_read(scorer: OcrScorer) -> None:
    judgement = scorer(pictures(), signs())
    assert judgement.valid.all()
    assert judgement.values.tolist() == [1.0] * 16
    assert judgement.details["strict"].tolist() == [1.0] * 16
    assert [text.lower() for text in judgement.details["text"]] == list(WORDS)


def test_wrong_words_score_by_their_letters(scorer: OcrScorer) -> None:
    judgement = scorer(pictures(("cat", "cab", "dog", "cat")), signs(("cat", "cat", "cat", "cats")))
    np.testing.assert_allclose(judgement.values, [1.0, 2 / 3, 0.0, 3 / 4])
    assert judgement.details["strict"].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_nothing_read_is_a_valid_zero(scorer: OcrScorer) -> None:
    judgement = scorer(np.full((1, 16, 48, 3), 245, dtype=np.uint8), signs(("cat",)))
    assert (judgement.values[0], judgement.valid[0], judgement.details["text"][0]) == (0.0, True, "")


def test_sized_and_padded_input_read_the_same(
    scorer: OcrScorer, padded: Callable[[Images], list[str]]
) -> None:
    noisy = pictures() + np.random.default_rng(0).normal(0, 8, (16, 16, 48, 3))
    for images in (pictures(), np.clip(noisy, 0, 255).astype(np.uint8)):
        assert scorer(images, signs()).details["text"].tolist() == padded(images)


def test_lines_are_read_at_their_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of 16 x 48 pixels take 144 columns of the network, where padded ones would take 320."""
    shapes: list[tuple[int, ...]] = []

    class Reader:
        def predict(self, images: list[Any], batch_size: int) -> list[dict[str, str]]:
            return [{"rec_text": "cat"}] * len(images)

    def made(*, input_shape: tuple[int, ...]) -> Reader:
        shapes.append(input_shape)
        return Reader()

    monkeypatch.setattr(ocr, "text_recognition", lambda threads: made)
    scorer = OcrScorer()
    for _ in range(2):
        assert scorer(pictures(), signs()).valid.all()
    assert shapes == [(3, 48, 144)]


def test_images_of_another_size_are_read_too(scorer: OcrScorer) -> None:
    line = page((20, 100, "Noise Margin"))[90:170]
    assert scorer(line[None], [prompt('"noise margin"')]).values[0] == 1.0
    assert scorer(pictures(), signs()).values.mean() == 1.0


def test_a_whole_page_is_found_and_read_in_order(cache: Path) -> None:
    images = np.stack([page((280, 30, "WORLD"), (40, 30, "HELLO"), (60, 150, "again")), page()])
    judgement = OcrScorer(mode="full")(images, [prompt('a page: "Hello world again"'), prompt('"x"')])
    assert judgement.values.tolist() == [1.0, 0.0]
    assert judgement.details["text"].tolist() == ["HELLO WORLD again", ""]
    assert judgement.valid.all()


def test_reading_goes_by_lines_and_then_from_the_left() -> None:
    boxes = np.array([[50, 2, 90, 12], [0, 0, 40, 10], [0, 20, 40, 30], [50, 18, 90, 28]])
    assert in_reading_order(["b", "a", "c", "d"], boxes) == ["a", "b", "c", "d"]
    assert in_reading_order([], np.zeros((0, 4))) == []


@pytest.mark.parametrize(
    ("given", "target"),
    [
        (prompt('a sign that says "Open Now"'), "opennow"),
        (prompt('"one" and "two"'), "one"),
        (prompt("a sign that says \u201cOpen\u201d"), "open"),
        (prompt('a sign "x"', text="From Metadata"), "frommetadata"),
        (prompt('a sign that says "\u200bOp\u00aden\ufeff"'), "open"),
        (prompt("a sign", text="cafe\u0301"), "caf\u00e9"),
    ],
)
def test_the_target_is_the_metadata_or_the_first_quotes(given: Prompt, target: str) -> None:
    assert target_text(given) == target
    OcrScorer.check(given)


@pytest.mark.parametrize(
    "given",
    [
        prompt("a sign"),
        prompt('a "" sign'),
        prompt('"  "'),
        prompt('"\u200b\u2060"'),
        prompt('"a"', text="\x00\u200b"),
        prompt('"a"', text=3),
    ],
)
def test_a_prompt_without_a_target_is_refused(given: Prompt) -> None:
    with pytest.raises(ValueError, match=r"^expected a text to write in metadata 'text'"):
        OcrScorer.check(given)


@pytest.mark.parametrize("key", ["txt", "Text", "texts"])
def test_a_slip_of_the_key_is_refused_although_there_are_quotes(key: str) -> None:
    with pytest.raises(ValueError, match=rf"metadata: unknown key '{key}'; did you mean text\?"):
        OcrScorer.check(prompt('a sign "x"', **{key: "y"}))
    OcrScorer.check(prompt("a sign", text="x", **{key: "y"}))
    OcrScorer.check(prompt('a sign "x"', tag="word", context="street"))


@given(st.text(max_size=12), st.text("abcdef", min_size=1, max_size=8))
def test_similarity_is_in_range_and_one_only_when_equal(read: str, target: str) -> None:
    score = similarity(read, target)
    assert 0.0 <= score <= 1.0
    assert (score == 1.0) == (normalize(read) == target)
    assert similarity(f" {target.upper()}\u200b ", target) == 1.0


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="mode must be 'recognition' or 'full', got 'fast'"):
        OcrScorer(mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        OcrScorer(threads=0)


def test_racing_processes_share_whole_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOISEMARGIN_CACHE", str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: model_folders(), range(3)))
    assert found[0] == found[1] == found[2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["ppocr-v6"]
    for folder in found[0].values():
        assert {entry.name for entry in folder.iterdir()} == {"inference.onnx", "inference.yml"}


def test_the_cache_is_the_users_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOISEMARGIN_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(ocr_weights, "_fill", lambda folder, name: folder.mkdir())
    assert model_folders()[RECOGNITION] == tmp_path / ".cache" / "noisemargin" / "ppocr-v6" / RECOGNITION


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOISEMARGIN_CACHE", str(tmp_path))
    monkeypatch.setattr(ocr_weights, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"come with the package rapidocr"):
        model_folders()
    monkeypatch.undo()
    monkeypatch.setitem(ocr_weights._ONNX, RECOGNITION, "PP-OCRv9.onnx")
    monkeypatch.setenv("NOISEMARGIN_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"weights are missing: expected .*PP-OCRv9.onnx"):
        model_folders()
    assert not any(tmp_path.iterdir())
