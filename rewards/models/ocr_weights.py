"""Model folders for PaddleOCR, from the PP-OCRv6 weights in the rapidocr wheel; nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

DETECTION: Final = "PP-OCRv6_small_det"
RECOGNITION: Final = "PP-OCRv6_small_rec"
_ONNX: Final = {DETECTION: "PP-OCRv6_det_small.onnx", RECOGNITION: "PP-OCRv6_rec_small.onnx"}


def model_folders() -> dict[str, Path]:
    """Return the folders of the detection and the recognition model by model name, created on first use.

    They are in ``$NOISEMARGIN_CACHE/ppocr-v6`` or ``~/.cache/noisemargin/ppocr-v6``, each with an
    ``inference.onnx`` and an ``inference.yml``.

    Raises:
        FileNotFoundError: if the weights are missing.
    """
    cache = os.environ.get("NOISEMARGIN_CACHE")
    root = (Path(cache) if cache else Path.home() / ".cache" / "noisemargin") / "ppocr-v6"
    if not root.is_dir():
        _make(root)
    return {name: root / name for name in _ONNX}


def _make(root: Path) -> None:
    """Fill a folder beside ``root`` and rename it, so that ``root`` is complete as soon as it exists."""
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".ppocr-", dir=root.parent))
    try:
        for name in _ONNX:
            _fill(draft / name, name)
        draft.rename(root)
    except OSError:
        if not root.is_dir():  # otherwise another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill(folder: Path, name: str) -> None:
    import yaml

    folder.mkdir()
    weights = _wheel_weights(_ONNX[name])
    shutil.copyfile(weights, folder / "inference.onnx")
    settings = _detection() if name == DETECTION else _recognition(weights)
    text = yaml.safe_dump({"Global": {"model_name": name}, **settings}, allow_unicode=True, sort_keys=False)
    (folder / "inference.yml").write_text(text, encoding="utf-8")


def _wheel_weights(name: str) -> Path:
    spec = find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the OCR weights come with the package rapidocr (3.10 or newer): install it")
    path = Path(spec.origin).parent / "models" / name
    if not path.is_file():
        raise FileNotFoundError(f"the OCR weights are missing: expected {path} of rapidocr 3.10 or newer")
    return path


def _detection() -> dict[str, Any]:
    normalize = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "scale": "1./255.",
        "order": "hwc",
    }
    return {
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                {"DetLabelEncode": None},
                {"DetResizeForTest": {"resize_long": 960}},
                {"NormalizeImage": normalize},
                {"ToCHWImage": None},
                {"KeepKeys": {"keep_keys": ["image", "shape", "polys", "ignore_tags"]}},
            ]
        },
        "PostProcess": {
            "name": "DBPostProcess",
            "thresh": 0.3,
            "box_thresh": 0.6,
            "max_candidates": 1000,
            "unclip_ratio": 1.5,
        },
    }


def _recognition(weights: Path) -> dict[str, Any]:
    return {
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                {"MultiLabelEncode": {"gtc_encode": "NRTRLabelEncode"}},
                {"RecResizeImg": {"image_shape": [3, 48, 320]}},
                {"KeepKeys": {"keep_keys": ["image", "label_ctc", "label_gtc", "length", "valid_ratio"]}},
            ]
        },
        "PostProcess": {"name": "CTCLabelDecode", "character_dict": _characters(weights)},
    }


def _characters(weights: Path) -> list[str]:
    """Read the recogniser's alphabet from its ONNX file, which has one character per line."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
    metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return metadata["character"].splitlines()
