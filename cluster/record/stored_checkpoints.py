"""Find, verify and read the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

from fsspec.core import open_local, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from cluster.config.errors import UserError
from cluster.record.events import warn
from cluster.record.marker import Commit, from_marker
from cluster.record.names import MARKER
from learner.digests import crc32, digest
from learner.records import Digest

READERS: Final = 4
"""Files read in parallel when a checkpoint is verified."""


class DamagedError(UserError):
    """A file of a checkpoint is missing or differs from what was written."""


class StoredCheckpoints:
    """The checkpoints in a folder or at any fsspec URL: those folders that have a commit marker."""

    def __init__(self, url: str) -> None:
        """Open the folder at a URL."""
        self.filesystem, self.root = url_to_fs(url)
        self.damaged: dict[int, str] = {}
        self.unreported: list[int] = []

    def url(self, step: int) -> str:
        """Return the URL of the checkpoint after a step."""
        return str(self.filesystem.unstrip_protocol(self._path(step)))

    def _path(self, step: int) -> str:
        return f"{self.root}/step-{step}"

    def steps(self) -> list[int]:
        """List the steps with a committed checkpoint that is not known to be damaged, oldest first."""
        self.filesystem.invalidate_cache()
        found = self.filesystem.glob(f"{self.root}/step-*/{MARKER}")
        names = {str(path).split("/")[-2].removeprefix("step-") for path in found}
        return sorted({int(name) for name in names if name.isdecimal()} - self.damaged.keys())

    def _files(self, step: int) -> dict[str, int]:
        self.filesystem.invalidate_cache()
        found = self.filesystem.find(self._path(step), detail=True)
        prefix = f"{self._path(step)}/"
        return {path.removeprefix(prefix): int(entry["size"]) for path, entry in found.items()}

    def newest(self, fits: Callable[[Commit], None] = lambda commit: None) -> Commit | None:
        """Find the newest undamaged checkpoint, reading every file of it; None without any checkpoint.

        Args:
            fits: refuses a checkpoint by an error, before its files are read.

        Raises:
            UserError: if every checkpoint is damaged.
        """
        for step in reversed(self.steps()):
            try:
                commit = self.read(step)
                fits(commit)
                self.verify(commit)
                return commit
            except DamagedError as error:
                self.damaged[step] = str(error)
                self.unreported.append(step)
        if self.damaged:
            raise UserError(f"{self.root}: every checkpoint is damaged: {'; '.join(self.damaged.values())}")
        return None

    def report_damage(self, print_line: Callable[[str], None]) -> None:
        """Report every damaged checkpoint once, by a printed line and an event."""
        while self.unreported:
            step = self.unreported.pop(0)
            warn("checkpoint damaged", checkpoint=step, reason=self.damaged[step])
            print_line(f"damaged, so an older checkpoint is used: {self.damaged[step]}")

    def read(self, step: int) -> Commit:
        """Read the marker of a checkpoint.

        Raises:
            DamagedError: if the marker cannot be read, or files are missing or cut short.
        """
        commit, found = self._commit(step), self._files(step)
        for name, entry in commit.files.items():
            if found.get(name) != entry.size:
                self._damaged(step, name, f"has {found.get(name, 'no')} bytes, expected {entry.size}")
        return commit

    def _commit(self, step: int) -> Commit:
        try:
            return from_marker(self.filesystem.cat_file(f"{self._path(step)}/{MARKER}"))
        except (OSError, ValueError) as error:
            self._damaged(step, MARKER, f"is not a checkpoint marker: {error}")

    def verify(self, commit: Commit) -> None:
        """Read every file of a checkpoint and compare its digest; files without one are skipped.

        Raises:
            DamagedError: if one cannot be read or differs from what was written.
        """
        expected = {name: entry for name, entry in commit.files.items() if entry.crc32 is not None}
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(partial(self._crc32, commit.step), expected)
            for (name, entry), value in zip(expected.items(), found, strict=True):
                self._check(commit.step, name, replace(entry, crc32=value), entry)

    def _crc32(self, step: int, name: str) -> str:
        try:
            with self.filesystem.open(f"{self._path(step)}/{name}", "rb") as file:
                return crc32(file)
        except OSError as error:
            self._damaged(step, name, f"cannot be read: {error}")

    def _check(self, step: int, name: str, found: Digest, expected: Digest) -> None:
        if found.size != expected.size:
            self._damaged(step, name, f"has {found.size} bytes, expected {expected.size}")
        if expected.crc32 not in (None, found.crc32):
            self._damaged(step, name, f"has the CRC-32 {found.crc32}, expected {expected.crc32}")

    def _damaged(self, step: int, name: str, what: str) -> NoReturn:
        raise DamagedError(f"{self._path(step)}/{name} {what}")

    def file(self, step: int, name: str) -> Path:
        """Return the local path of a checkpoint's file, downloaded if it is elsewhere.

        Raises:
            FileNotFoundError: if the checkpoint has no such file.
            DamagedError: if it differs from what was written.
        """
        url = f"{self.url(step)}/{name}"
        expected = self._commit(step).files.get(name)
        if expected is None:
            raise FileNotFoundError(f"the checkpoint has no {url}")
        if not self.filesystem.exists(f"{self._path(step)}/{name}"):
            self._damaged(step, name, "is missing")
        local = isinstance(self.filesystem, LocalFileSystem)
        path = Path(open_local(url if local else f"simplecache::{url}"))
        self._check(step, name, digest(path), expected)
        return path
