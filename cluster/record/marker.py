"""What the marker of a checkpoint says, and how it is written."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from cluster.config.version import commit
from cluster.config.version import version as own_version
from learner.records import Digest

MARKER: Final = "COMMITTED"
PACKAGES: Final = ("torch", "deepspeed", "diffusers", "transformers", "peft", "ray", "numpy")
OWN: Final = "noisemargin"
"""Our own entry among the packages; beside it is one with the commit, where that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A checkpoint: the digests of its files, the run's configuration, its counters and its packages."""

    step: int
    empty_batches: int
    files: dict[str, Digest]
    settings: dict[str, Any]
    packages: dict[str, str]


def to_marker(commit: Commit) -> bytes:
    """Write a commit as JSON, with a digest of itself."""
    said = asdict(commit)
    return json.dumps({**said, "crc32": _crc32(said)}).encode()


def from_marker(content: bytes) -> Commit:
    """Read a marker; in those of older versions files have sizes alone, and the marker itself no digest.

    Raises:
        ValueError: if it is none, or not what was written.
    """
    try:
        said = dict(json.loads(content))
        expected = said.pop("crc32", None)
        if expected not in (None, _crc32(said)):
            raise ValueError(f"it has the CRC-32 {_crc32(said)}, expected {expected}")
        return Commit(**{**said, "files": {name: _digest(entry) for name, entry in said["files"].items()}})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def installed() -> dict[str, str]:
    """List the versions that the numbers depend on: NoiseMargin's and its packages'."""
    found = {OWN: own_version()}
    if commit():
        found[f"{OWN} commit"] = commit()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _crc32(said: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(said).encode()):08x}"


def _digest(entry: Any) -> Digest:
    return Digest(size=entry, crc32=None) if isinstance(entry, int) else Digest(**entry)
