"""The content of a checkpoint's commit marker, and its JSON format."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from cluster.config.version import commit
from cluster.config.version import version as own_version
from learner.records import Digest

PACKAGES: Final = ("torch", "deepspeed", "diffusers", "transformers", "peft", "ray", "numpy")
OWN: Final = "noisemargin"
"""NoiseMargin's own entry among the packages; another one has its commit, where that is known."""


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
    fields = asdict(commit)
    return json.dumps({**fields, "crc32": _crc32(fields)}).encode()


def from_marker(content: bytes) -> Commit:
    """Read a marker; older versions wrote sizes without digests, and no digest of the marker itself.

    Raises:
        ValueError: if it is not a marker, or differs from what was written.
    """
    try:
        fields = dict(json.loads(content))
        expected = fields.pop("crc32", None)
        if expected not in (None, _crc32(fields)):
            raise ValueError(f"it has the CRC-32 {_crc32(fields)}, expected {expected}")
        files = {name: _digest(entry) for name, entry in fields["files"].items()}
        return Commit(**{**fields, "files": files})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def installed() -> dict[str, str]:
    """List the versions that a run's numbers depend on: NoiseMargin's and its packages'."""
    found = {OWN: own_version()}
    if commit():
        found[f"{OWN} commit"] = commit()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _crc32(fields: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(fields).encode()):08x}"


def _digest(entry: Any) -> Digest:
    return Digest(size=entry, crc32=None) if isinstance(entry, int) else Digest(**entry)
