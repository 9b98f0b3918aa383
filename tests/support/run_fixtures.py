"""What the tests of the service share: a model folder, prompts and a configuration."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import psutil
import pytest
import ray

from cluster.actors.connection import connect
from cluster.config import model_check
from cluster.config.settings import ClusterSettings, RunSettings
from cluster.config.sources import resolve
from rollout.check import Question, answer

Configure = Callable[..., RunSettings]


OWN_PROCESS: Final = model_check._ask


@pytest.fixture(autouse=True)
def judged_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run's model be judged in this process, which has had its libraries for long, and as quietly."""

    def ask(question: str) -> str:
        with redirect_stderr(io.StringIO()):
            return json.dumps(answer(Question.model_validate_json(question)))

    monkeypatch.setattr(model_check, "_ask", lru_cache(maxsize=1)(ask))


@pytest.fixture
def judged_apart(judged_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model be judged in a process of its own, as in a run."""
    OWN_PROCESS.cache_clear()
    monkeypatch.setattr(model_check, "_ask", OWN_PROCESS)


@pytest.fixture(scope="module")
def node() -> Iterator[None]:
    """A local Ray node of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        connect(ClusterSettings(object_store_gb=0.2))
        yield
        ray.shutdown()


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """As much of the bundled pipeline as is read before an actor starts: all but its weights."""
    folder = tmp_path / "model"
    shutil.copytree("rollout/tiny/shapes", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def configure(model_folder: Path, tmp_path: Path) -> Configure:
    """A resolved configuration of the shapes preset, with overrides."""

    def make(**overrides: Any) -> RunSettings:
        return resolve(
            "shapes", {"model": {"path": str(model_folder)}, "folder": str(tmp_path / "run"), **overrides}
        )

    return make


@pytest.fixture
def set_free_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let psutil report some free memory, in GB, with as much shared memory as Ray may want."""

    def report(gigabytes: float) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=gigabytes * 1e9))
        set_shared_memory(monkeypatch, gigabytes)

    return report


def set_shared_memory(patch: pytest.MonkeyPatch, free: float, total: float | None = None) -> None:
    """Let /dev/shm have some GB free, by default all of it."""
    whole = total or free
    patch.setattr(shutil, "disk_usage", lambda path: (whole * 1e9, (whole - free) * 1e9, free * 1e9))
