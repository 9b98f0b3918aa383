"""Where a rank's share of a checkpoint is written: a folder, or anything that fsspec reaches."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


class Storage:
    """Writes to local folders directly; elsewhere by way of a temporary folder and a thread that uploads."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self.uploader = ThreadPoolExecutor(max_workers=1)
        self.upload: Future[None] | None = None

    def save(self, url: str, write: Callable[[Path], None]) -> None:
        """Let ``write`` fill a folder that ends up at the URL; returns when the state may change again."""
        filesystem, path = url_to_fs(url)
        if isinstance(filesystem, LocalFileSystem):
            write(Path(path))
            return
        scratch = Path(tempfile.mkdtemp(prefix="checkpoint-"))
        write(scratch)
        self.upload = self.uploader.submit(_put, filesystem, scratch, path)

    def saved(self, wait: bool) -> bool:
        """Whether the last save has arrived; raises what its upload raised."""
        if self.upload is None:
            return True
        if not wait and not self.upload.done():
            return False
        self.upload.result()
        self.upload = None
        return True

    @contextmanager
    def fetched(self, url: str) -> Iterator[Path]:
        """The files at the URL as a local folder."""
        filesystem, path = url_to_fs(url)
        if isinstance(filesystem, LocalFileSystem):
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            filesystem.get(path.rstrip("/") + "/", scratch + "/", recursive=True)
            yield Path(scratch)


def _put(filesystem: Any, scratch: Path, path: str) -> None:
    try:
        filesystem.put(f"{scratch}/", path.rstrip("/") + "/", recursive=True)
    finally:
        shutil.rmtree(scratch)
