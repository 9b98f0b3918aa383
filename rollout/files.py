"""Files that are written atomically."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield the path of a draft that becomes the file when the block ends without an error.

    A kill or a full disk leaves the old file or none, a reader never meets half of one, and processes that
    write the same file do not mix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    yield draft
    draft.replace(path)
