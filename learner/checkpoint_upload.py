"""Storage of a rank's files of a checkpoint, in a folder or in any store that fsspec supports."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from learner.digests import digests
from learner.records import Written


class Storage:
    """A writer of one rank's checkpoint files, to a local folder or a remote store.

    Files are written to a folder that no other rank uses, and their digests are computed there. Then they are
    moved at once to a local folder, or uploaded by a thread.
    """

    def __init__(self) -> None:
        """Start the thread, with nothing saved."""
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.transfer: Future[Written] | None = None

    def save(self, url: str, write: Callable[[Path], None]) -> None:
        """Store the files that ``write`` writes at the URL; return as soon as the state may change again."""
        filesystem, path = url_to_fs(url)
        local = isinstance(filesystem, LocalFileSystem)
        if local:
            Path(path).mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=path if local else None))
        write(scratch)
        transfer = partial(_move, path) if local else partial(_upload, filesystem, path)
        self.transfer = self.executor.submit(_transferred, scratch, transfer)
        if local:
            self.transfer.result()

    def saved(self, wait: bool) -> Written | None:
        """Return the files of the last save, or None while they are being uploaded.

        Raises:
            RuntimeError: if nothing has been saved.
            Exception: the one that the transfer raised, if it failed.
        """
        if self.transfer is None:
            raise RuntimeError("nothing has been saved")
        return self.transfer.result() if wait or self.transfer.done() else None

    @contextmanager
    def fetched(self, url: str) -> Iterator[Path]:
        """Yield a local folder with the files at the URL."""
        filesystem, path = url_to_fs(url)
        if isinstance(filesystem, LocalFileSystem):
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            filesystem.get(path.rstrip("/") + "/", scratch + "/", recursive=True)
            yield Path(scratch)


def _transferred(scratch: Path, transfer: Callable[[Path], None]) -> Written:
    try:
        files = digests(scratch)
        transfer(scratch)
    finally:
        shutil.rmtree(scratch)
    return Written(host=socket.gethostname(), files=files)


def _move(path: str, scratch: Path) -> None:
    for source in [found for found in scratch.rglob("*") if found.is_file()]:
        target = Path(path) / source.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)


def _upload(filesystem: Any, path: str, scratch: Path) -> None:
    filesystem.put(f"{scratch}/", path.rstrip("/") + "/", recursive=True)
