"""The version of NoiseMargin, and the commit of its checkout."""

from __future__ import annotations

import os
import subprocess
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
COMMIT_VARIABLE: Final = "NOISEMARGIN_COMMIT"
"""The variable with the commit of a copy that is not a git checkout, such as the upload of a job."""


@lru_cache
def version() -> str:
    """Read the version from pyproject.toml: packages are run from the checkout and never installed."""
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except FileNotFoundError:  # a copy of the packages alone
        return "unknown"
    return str(project["version"])


@lru_cache
def commit() -> str:
    """Return the checkout's short hash, with a + if tracked files have changed; empty if unknown."""
    if not (ROOT / ".git").exists():  # git would answer for a repository around this one
        return os.environ.get(COMMIT_VARIABLE, "")
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
