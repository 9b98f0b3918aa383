"""Where a rank's share of a checkpoint is written: a folder, or anything that fsspec reaches."""

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
    """Writes to a folder that no other rank uses, takes digests there, and passes the files on.

    To a folder they are moved at once; elsewhere a thread uploads them.
    """

    def __init__(self) -> None:
        """Start with nothing saved."""
        self.courier = ThreadPoolExecutor(max_workers=1)
        self.delivery: Future[Written] | None = None

    def save(self, url: str, write: Callable[[Path], None]) -> None:
        """Let ``write`` fill a folder that ends up at the URL; returns when the state may change again."""
        filesystem, path = url_to_fs(url)
        local = isinstance(filesystem, LocalFileSystem)
        if local:
            Path(path).mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=path if local else None))
        write(scratch)
        pass_on = partial(_move, path) if local else partial(_upload, filesystem, path)
        self.delivery = self.courier.submit(_deliver, scratch, pass_on)
        if local:
            self.delivery.result()

    def saved(self, wait: bool) -> Written | None:
        """The files of the last save, or None while they are under way; raises what their delivery raised."""
        if self.delivery is None:
            raise RuntimeError("nothing has been saved")
        return self.delivery.result() if wait or self.delivery.done() else None

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


def _deliver(scratch: Path, pass_on: Callable[[Path], None]) -> Written:
    try:
        files = digests(scratch)
        pass_on(scratch)
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
