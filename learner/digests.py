"""Digests of a checkpoint's files, to detect damage on a disk or in transfer."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import BinaryIO, Final

from learner.records import Digest

CHUNK: Final = 1 << 24
"""Bytes of a file in memory at a time."""


def crc32(file: BinaryIO) -> str:
    """Compute the CRC-32 of the rest of a file, as eight hexadecimal digits.

    It protects against damage, not against an adversary. The standard library's is several times as fast as
    its cryptographic hashes, and it releases the interpreter's lock, so that threads can read several files
    at once.
    """
    value = 0
    while chunk := file.read(CHUNK):
        value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def digest(path: Path) -> Digest:
    """Compute the digest of a local file."""
    with path.open("rb") as file:
        return Digest(size=path.stat().st_size, crc32=crc32(file))


def digests(folder: Path) -> dict[str, Digest]:
    """Compute the digest of every file below a folder, by its path relative to the folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest(path) for path in found}
