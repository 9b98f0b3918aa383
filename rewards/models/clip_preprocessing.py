"""What images are turned into for a CLIP model: from where it is known, never by guess."""

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
"""Pillow's numbers, which the hub's files hold."""


class Preprocessing(Settings):
    """The mean and spread (standard deviation) of each channel in [0, 1], and how images are resized.

    The names are those of ``preprocess_cfg`` in open_clip's files; what is not said is open_clip's default.
    """

    mean: Triple
    std: Triple
    interpolation: str | None = None
    resize_mode: str | None = None


def stated(values: Mapping[str, Any], where: str = "") -> Preprocessing:
    """What somebody says; raises ``ValueError`` of one line when it lacks mean or spread, or says more."""
    try:
        return Preprocessing.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}" if where else explain(error)) from None


def beside(weights: Path) -> Preprocessing | None:
    """What the configuration in the folder of some weights says, if there is one.

    Raises ``ValueError`` or ``OSError`` when it cannot be read or lacks mean or spread.
    """
    ours, hub = weights.parent / OPENCLIP_CONFIG, weights.parent / HUB_CONFIG
    if ours.is_file():
        return stated(known(_json(ours).get("preprocess_cfg", {})), str(ours))
    if not hub.is_file():
        return None
    found = _json(hub)
    values = {"mean": found.get("image_mean"), "std": found.get("image_std")}
    return stated({**values, "interpolation": _RESAMPLING.get(found.get("resample"))}, str(hub))


def known(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of open_clip's configuration that is ours."""
    return {name: values[name] for name in Preprocessing.model_fields if name in values}


def common(published: Iterable[Mapping[str, Any]]) -> Preprocessing | None:
    """What all published weights of an architecture agree on, if that includes mean and spread."""
    first, *others = [known(one) for one in published] or [{}]
    agreed = {name: value for name, value in first.items() if all(one.get(name) == value for one in others)}
    return stated(agreed) if {"mean", "std"} <= agreed.keys() else None


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
