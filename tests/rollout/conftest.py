"""Fixtures of the rollout stage's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.tools.tiny_families import TINY

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The tiny checkpoint of a family, saved once for a module."""
    root = tmp_path_factory.mktemp("families")

    def save(name: str) -> Path:
        return root / name if (root / name).exists() else TINY[name].save(root / name)

    return save
