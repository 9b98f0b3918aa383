"""Checkpoints: the commit marker is written last, and its presence is the checkpoint."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import psutil
from fsspec.core import open_local, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from cluster.actors.learner import Learner, LearnerError
from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.record.events import note, warn
from cluster.record.files import write_bytes
from cluster.record.marker import MARKER, Commit, from_marker, installed, to_marker
from cluster.record.run_folder import RunFolder
from learner.digests import crc32, digest
from learner.records import Digest, Written

RECORD: Final = "run/"
"""Where a checkpoint keeps files of the run folder."""
READERS: Final = 4
"""Files that are read at once when a checkpoint is verified."""
SHOWN_WITHIN: Final = 30.0
"""Seconds that a shared file system is given to show what another node has written: NFS caches listings."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, most likely since the disk is full; the older ones are untouched."""


class DamagedError(UserError):
    """A file of a checkpoint is missing or not what was written."""


class Checkpoints:
    """The checkpoints of a run, in a folder or at any fsspec URL, newest kept.

    Everything outside the learner is a pure function of the seed and the step: prompts, noise, ties and
    shuffles, and so the groups in flight, which a resumed run samples again. The learner's state, the step
    and a few counters are all there is to save; and, since checkpoints may outlive the run folder, what later
    steps are compared with: the metrics so far and the held-out scores at the start.
    """

    def __init__(
        self,
        url: str,
        keep: int,
        settings: dict[str, Any] | None = None,
        record: RunFolder | None = None,
    ) -> None:
        """Manage the checkpoints below a URL; ``keep`` survive; settings and record are kept in each."""
        self.filesystem, self.root = url_to_fs(url)
        self.keep, self.settings, self.record = keep, settings or {}, record
        self.pending: tuple[int, int] | None = None
        self.damaged: dict[int, str] = {}
        self.untold: list[int] = []

    def url(self, step: int) -> str:
        """Where the checkpoint after a step lies."""
        return str(self.filesystem.unstrip_protocol(self._path(step)))

    def _path(self, step: int) -> str:
        return f"{self.root}/step-{step}"

    def steps(self) -> list[int]:
        """The steps with a committed checkpoint that is not known to be damaged, oldest first."""
        self.filesystem.invalidate_cache()
        found = self.filesystem.glob(f"{self.root}/step-*/{MARKER}")
        names = {str(path).split("/")[-2].removeprefix("step-") for path in found}
        return sorted({int(name) for name in names if name.isdecimal()} - self.damaged.keys())

    async def commit(self, step: int, learner: Learner, *, empty_batches: int = 0) -> None:
        """Let the learner save; the marker follows when everything has arrived, see `settle`."""
        await self.settle(learner, wait=True)
        with self._writing(step):
            await asyncio.to_thread(self._clear, step)
            await learner.save(self.url(step))
        self.pending = step, empty_batches

    async def settle(self, learner: Learner, *, wait: bool) -> None:
        """Commit what was saved if all of it has arrived, and drop the oldest checkpoints."""
        if self.pending is None:
            return
        with self._writing(self.pending[0]):
            written = await learner.saved(wait=wait)
            if written is None:
                return
            await asyncio.to_thread(self._mark, *self.pending, written)
        self.pending = None

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Say of what could not be written which checkpoint is left."""
        try:
            yield
        except (OSError, LearnerError) as error:
            raise CheckpointError(
                f"checkpoint {self.url(step)} could not be written: {error}{self._room()}; {self._left()}"
            ) from error

    def _left(self) -> str:
        last = max(self.steps(), default=0)
        return f"--resume continues from step {last}" if last else "there is no older one"

    def _room(self) -> str:
        """What is free on a disk of this machine; what a writer says of a full one is often obscure."""
        if not isinstance(self.filesystem, LocalFileSystem) or not self.filesystem.exists(self.root):
            return ""
        return f" ({psutil.disk_usage(self.root).free / 1e9:.2f} GB are free there)"

    def _clear(self, step: int) -> None:
        if self.filesystem.exists(self._path(step)):
            self._remove(step)
        self.damaged.pop(step, None)
        self.filesystem.makedirs(self._path(step), exist_ok=True)

    def _remove(self, step: int) -> None:
        marker = f"{self._path(step)}/{MARKER}"
        if self.filesystem.exists(marker):
            self.filesystem.rm_file(marker)  # first, so that half a checkpoint never looks like one
        self.filesystem.rm(self._path(step), recursive=True)

    def _mark(self, step: int, empty_batches: int, written: Sequence[Written]) -> None:
        self._check_seen(step, written)
        files = {name: entry for one in written for name, entry in one.files.items()} | self._keep(step)
        commit = Commit(
            step=step, empty_batches=empty_batches, files=files, settings=self.settings, packages=installed()
        )
        path = f"{self._path(step)}/{MARKER}"
        draft = f"{path}.part"
        self.filesystem.pipe_file(draft, to_marker(commit))
        self.filesystem.mv(draft, path)
        note("checkpoint committed", checkpoint=step)
        for old in self.steps()[: -self.keep]:
            self._remove(old)

    def _check_seen(self, step: int, written: Sequence[Written]) -> None:
        """Wait until all that the ranks have written is seen from here.

        Raises:
            CheckpointError: if it is not: their folder is another one than this machine's.
        """
        if not any(one.files for one in written):
            raise CheckpointError(f"checkpoint {self.url(step)}: no rank has written a file; {self._left()}")
        deadline = time.monotonic() + SHOWN_WITHIN
        while unseen := self._unseen(step, written):
            if time.monotonic() >= deadline:
                raise CheckpointError(
                    f"checkpoint {self.url(step)}: {unseen}; all nodes must share this folder: put it on a "
                    f"shared file system, or name a URL with --checkpoints; {self._left()}"
                )
            time.sleep(0.5)

    def _unseen(self, step: int, written: Sequence[Written]) -> str:
        """What a rank has written and this machine does not see; empty if nothing."""
        found = self._files(step)
        for one in written:
            unseen = [name for name, entry in one.files.items() if found.get(name) != entry.size]
            if unseen:
                name = unseen[0]
                return (
                    f"{one.host} has written {len(one.files)} files of which {socket.gethostname()} does not "
                    f"see {len(unseen)}, such as {name} ({found.get(name, 'no')} bytes, expected "
                    f"{one.files[name].size})"
                )
        return ""

    def _keep(self, step: int) -> dict[str, Digest]:
        """Copy what a checkpoint keeps of the run folder; the digests of the copies."""
        copied: dict[str, Digest] = {}
        if self.record is None:
            return copied
        for source in self.record.kept():
            name = f"{RECORD}{source.relative_to(self.record.path).as_posix()}"
            target = f"{self._path(step)}/{name}"
            self.filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.filesystem.put_file(str(source), target)
            copied[name] = digest(source)
        return copied

    def _files(self, step: int) -> dict[str, int]:
        self.filesystem.invalidate_cache()
        found = self.filesystem.find(self._path(step), detail=True)
        prefix = f"{self._path(step)}/"
        return {path.removeprefix(prefix): int(entry["size"]) for path, entry in found.items()}

    def newest(self, fits: Callable[[Commit], None] = lambda commit: None) -> Commit | None:
        """Find the newest checkpoint that is whole; None if there is none at all. It reads every file.

        Args:
            fits: raises what speaks against a checkpoint, before its files are read.

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
                self.untold.append(step)
        if self.damaged:
            raise UserError(f"{self.root}: every checkpoint is damaged: {'; '.join(self.damaged.values())}")
        return None

    def tell_damage(self, tell: Callable[[str], None]) -> None:
        """Say of every damaged checkpoint, once, that an older one is taken: a line and an event."""
        while self.untold:
            step = self.untold.pop(0)
            warn("checkpoint damaged", checkpoint=step, reason=self.damaged[step])
            tell(f"damaged, so an older checkpoint is taken: {self.damaged[step]}")

    def read(self, step: int) -> Commit:
        """What the marker of a checkpoint says.

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
            self._damaged(step, MARKER, f"is no marker of a checkpoint: {error}")

    def verify(self, commit: Commit) -> None:
        """Read every file of a checkpoint and compare its digest; files without one are passed over.

        Raises:
            DamagedError: if one cannot be read or is not what was written.
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
        """A file of a checkpoint as a local one, fetched if it lies elsewhere.

        Raises:
            FileNotFoundError: if the checkpoint has no such file.
            DamagedError: if it is not what was written.
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

    def rewind(self, commit: Commit, folder: RunFolder) -> None:
        """Take a run folder back to what it was after a checkpoint's step, even if it was lost and made anew.

        Checkpoints of older versions keep nothing of the folder; then it only forgets what came after.
        """
        for name in commit.files:
            if name.startswith(RECORD):
                content = self.filesystem.cat_file(f"{self._path(commit.step)}/{name}")
                write_bytes(folder.path / name.removeprefix(RECORD), content)
        folder.rewind(commit.step)

    async def restore(self, step: int, learner: Learner) -> None:
        """Load the checkpoint after a step into the learner."""
        await learner.restore(self.url(step))
        note("checkpoint restored", checkpoint=step)


def checkpoints_of(settings: RunSettings, folder: RunFolder) -> Checkpoints:
    """The checkpoints of a run: where it says, or in its folder."""
    place = settings.checkpoints or str(folder.checkpoints)
    return Checkpoints(place, settings.keep_checkpoints, settings.model_dump(mode="json"), folder)
