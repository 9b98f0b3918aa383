"""Preprocessing of images for a CLIP model, read from a source that states it and never guessed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from rollout.settings import Settings, explain

Triple = tuple[float, float, float]
OPENCLIP_CONFIG: Final = "open_clip_config.json"
HUB_CONFIG: Final = "preprocessor_config.json"
_RESAMPLING: Final[dict[Any, str]] = {2: "bilinear", 3: "bicubic"}
"""Interpolation by Pillow's number, which the hub's files contain."""


class Preprocessing(Settings):
    """The mean and standard deviation of each channel in [0, 1], and the method of resizing.

    The names are those of ``preprocess_cfg`` in open_clip's files; None means open_clip's default.
    """

    mean: Triple
    std: Triple
    interpolation: str | None = None
    resize_mode: str | None = None


def parse_preprocessing(values: Mapping[str, Any], where: str = "") -> Preprocessing:
    """Validate a preprocessing; ``where`` names its source in the message.

    Raises:
        ValueError: in one line, if mean or standard deviation is missing or a key is unknown.
    """
    try:
        return Preprocessing.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}" if where else explain(error)) from None


def read_beside(weights: Path) -> Preprocessing | None:
    """Read the configuration in the folder of some weights, if there is one.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not JSON or lacks mean or standard deviation.
    """
    ours, hub = weights.parent / OPENCLIP_CONFIG, weights.parent / HUB_CONFIG
    if ours.is_file():
        return parse_preprocessing(own_fields(_json(ours).get("preprocess_cfg", {})), str(ours))
    if not hub.is_file():
        return None
    found = _json(hub)
    values = {"mean": found.get("image_mean"), "std": found.get("image_std")}
    return parse_preprocessing({**values, "interpolation": _RESAMPLING.get(found.get("resample"))}, str(hub))


def own_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Select the fields of `Preprocessing` from open_clip's configuration."""
    return {name: values[name] for name in Preprocessing.model_fields if name in values}


def common_to_all(published: Iterable[Mapping[str, Any]]) -> Preprocessing | None:
    """Return the fields on which all published weights agree, if they include mean and deviation."""
    first, *others = [own_fields(one) for one in published] or [{}]
    agreed = {name: value for name, value in first.items() if all(one.get(name) == value for one in others)}
    return parse_preprocessing(agreed) if {"mean", "std"} <= agreed.keys() else None


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
