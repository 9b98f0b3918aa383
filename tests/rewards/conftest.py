"""Tiny models in their real formats, made once."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest

from tests.support.reward_models import TINY_CLIP, save_clip, save_detector


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    save_clip(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of the same architecture, known to open_clip as the published ones are."""
    path = tmp_path_factory.mktemp("config") / "tiny-clip.json"
    path.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture(scope="session")
def random_detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mask2former")
    save_detector(folder)
    return folder
