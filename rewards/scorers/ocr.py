"""Rendered text as a reward: PaddleOCR with the real PP-OCRv6 weights, through onnxruntime on the CPU."""

from __future__ import annotations

import logging
import math
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rewards.metadata import check_spelling
from rewards.models.ocr_weights import DETECTION, RECOGNITION, model_folders
from rewards.scorer import Judgement, Traits
from rollout.records import Prompt
from rollout.text_files import visible

# PaddleX reads this when imported, and would otherwise probe the network for model hosts.
os.environ["PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK"] = "True"

LINE_HEIGHT: Final = 48
"""Height in pixels of a line as the recogniser sees it."""
_WIDEST: Final = 3200
_QUOTED: Final = re.compile(r'["\u201c]([^"\u201d]*)["\u201d]')


class OcrScorer:
    """Scorer of (N, H, W, 3) images by 1 - min(d, L) / L, d the edit distance to the target of length L.

    Source: FlowGRPO (arXiv 2505.05470), without its bonus for targets within longer text. Spaces, case
    and invisible characters do not count. ``mode="recognition"`` reads each image as one line, at a width
    that fits it; ``"full"`` finds the lines first and reads them from top to bottom. ``threads`` is
    onnxruntime's. An image without recognised text scores 0 and is valid. ``details``: ``strict`` (exact
    match) and ``text`` (the recognised text). Not thread-safe: one instance per process.
    """

    traits: ClassVar[Traits] = Traits(low=0.0, high=1.0)

    def __init__(self, mode: Literal["recognition", "full"] = "recognition", threads: int = 1) -> None:
        if mode not in ("recognition", "full"):
            raise ValueError(f"mode must be 'recognition' or 'full', got {mode!r}")
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self._reader = _LineReader(threads) if mode == "recognition" else _PageReader(threads)

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Read every image and compare the text with its prompt's target."""
        texts = self._reader.read(np.ascontiguousarray(images[..., ::-1]))
        values = [similarity(text, target_text(prompt)) for text, prompt in zip(texts, prompts, strict=True)]
        scores = np.array(values, dtype=np.float64)
        return Judgement(
            values=scores,
            valid=np.ones(len(scores), dtype=np.bool_),
            details={"strict": (scores == 1.0).astype(np.float64), "text": np.array(texts, dtype=np.str_)},
        )

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Refuse a prompt that names no text to write.

        Raises:
            ValueError: if it has no target text, or a key resembles the missing ``text``.
        """
        check_spelling(prompt.metadata, ("text",))
        target_text(prompt)


def target_text(prompt: Prompt) -> str:
    """Return the target: ``metadata["text"]`` or the first double-quoted text of the prompt, normalised.

    Raises:
        ValueError: if neither exists, or the text has no visible character.
    """
    found = prompt.metadata.get("text")
    if found is None:
        quoted = _QUOTED.search(prompt.text)
        found = quoted.group(1) if quoted else None
    if not isinstance(found, str) or not normalize(found):
        raise ValueError(
            "expected a text to write in metadata 'text' or in double quotes, "
            f"got {found!r} in {prompt.text!r}"
        )
    return normalize(found)


def normalize(text: str) -> str:
    """Compose the text (NFC) and lower its case, without white space and invisible characters."""
    return visible(unicodedata.normalize("NFC", text).lower())


def similarity(read: str, target: str) -> float:
    """Compute 1 - min(edit distance, L) / L, where ``target`` is normalised and of length L > 0."""
    from rapidfuzz.distance import Levenshtein

    return 1.0 - min(Levenshtein.distance(normalize(read), target), len(target)) / len(target)


def text_recognition(threads: int) -> Callable[..., Any]:
    """Return a factory of PaddleOCR's ``TextRecognition`` on the PP-OCRv6 weights."""
    from paddleocr import TextRecognition

    folder = model_folders()[RECOGNITION]
    return partial(TextRecognition, model_name=RECOGNITION, model_dir=str(folder), **_engine(threads))


class _LineReader:
    """Recognition alone, at the images' width, where PaddleX would pad every line to 320 columns."""

    def __init__(self, threads: int) -> None:
        self._make = text_recognition(threads)
        self._models: dict[int, Any] = {}

    def read(self, images: NDArray[np.uint8]) -> list[str]:
        """Read one line per (H, W, 3) BGR image."""
        height, width = images.shape[1:3]
        fitting = min(max(math.ceil(LINE_HEIGHT * width / height), LINE_HEIGHT), _WIDEST)
        if fitting not in self._models:
            # A model's input size is fixed at creation; a run has one image size, so one model is kept.
            self._models = {fitting: self._make(input_shape=(3, LINE_HEIGHT, fitting))}
        results = self._models[fitting].predict(list(images), batch_size=len(images))
        return [str(result["rec_text"]) for result in results]


class _PageReader:
    """Detection and recognition, the lines joined in reading order."""

    def __init__(self, threads: int) -> None:
        from paddleocr import PaddleOCR

        folders = model_folders()
        self._model = PaddleOCR(
            text_detection_model_name=DETECTION,
            text_detection_model_dir=str(folders[DETECTION]),
            text_recognition_model_name=RECOGNITION,
            text_recognition_model_dir=str(folders[RECOGNITION]),
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
            **_engine(threads),
        )

    def read(self, images: NDArray[np.uint8]) -> list[str]:
        """Read all text of each (H, W, 3) BGR image."""
        return [
            " ".join(in_reading_order(page["rec_texts"], np.asarray(page["rec_boxes"])))
            for page in self._model.predict(list(images))
        ]


def _engine(threads: int) -> dict[str, Any]:
    """Return the keyword arguments that every model of PaddleOCR takes."""
    logging.getLogger("paddlex").setLevel(logging.WARNING)  # it would log every model that it creates
    config = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    return {"engine": "onnxruntime", "device": "cpu", "engine_config": config}


def in_reading_order(texts: Sequence[str], boxes: NDArray[Any]) -> list[str]:
    """Sort texts by their (B, 4) boxes x0, y0, x1, y1: lines from the top, and from the left within a line.

    A box belongs to the line above it when its centre lies higher than the bottom of that line's first box.
    """
    lines: list[list[int]] = []
    for index in sorted(range(len(texts)), key=lambda i: float(boxes[i][1] + boxes[i][3])):
        middle = (boxes[index][1] + boxes[index][3]) / 2
        if lines and middle < boxes[lines[-1][0]][3]:
            lines[-1].append(index)
        else:
            lines.append([index])
    return [texts[i] for line in lines for i in sorted(line, key=lambda i: float(boxes[i][0]))]
