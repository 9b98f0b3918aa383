"""The version and the commit that a run records of itself."""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import version as ours
from tests.support.paths import ROOT

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    ours.version.cache_clear()
    ours.commit.cache_clear()
    yield
    ours.version.cache_clear()
    ours.commit.cache_clear()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A repository with one commit, in place of the checkout."""
    monkeypatch.setattr(ours, "ROOT", tmp_path)
    (tmp_path / "file").write_text("one")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "file"], [*author, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ours.version() == project["version"]


def test_a_copy_of_the_packages_alone_has_no_version(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(ours, "ROOT", tmp_path)
    assert ours.version() == "unknown"


def test_the_commit_is_marked_where_tracked_files_have_changed(checkout: Path) -> None:
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    full = subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
    (checkout / "new").touch()
    clean = ours.commit()
    assert len(clean) >= 7
    assert full.startswith(clean)
    (checkout / "file").write_text("two")
    ours.commit.cache_clear()
    assert ours.commit() == f"{clean}+"


def test_a_copy_inside_another_repository_is_not_of_its_commit(checkout: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(ours, "ROOT", checkout / "copy")
    monkeypatch.delenv(ours.COMMIT_VARIABLE, raising=False)
    assert ours.commit() == ""
    ours.commit.cache_clear()
    monkeypatch.setenv(ours.COMMIT_VARIABLE, "1234567")
    assert ours.commit() == "1234567"


def test_without_git_the_commit_is_unknown(checkout: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert ours.commit() == ""
