"""Write checkpoints, with the commit marker last: its presence is the checkpoint."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

import psutil
from fsspec.implementations.local import LocalFileSystem

from cluster.config.errors import CheckpointError, LearnerError
from cluster.config.settings import RunSettings
from cluster.record.events import note
from cluster.record.files import write_bytes
from cluster.record.marker import Commit, installed, to_marker
from cluster.record.names import MARKER
from cluster.record.run_folder import RunFolder
from cluster.record.stored_checkpoints import StoredCheckpoints
from learner.digests import digest
from learner.records import Digest, Written

RECORD: Final = "run/"
"""The folder of a checkpoint with copies of the run folder's files."""
VISIBLE_WITHIN: Final = 30.0
"""Seconds in which a shared file system must show what another node has written: NFS caches listings."""


class Saver(Protocol):
    """Saves and restores the state of the learner."""

    async def save(self, url: str) -> None:
        """Write the state below a URL, or begin to upload it there."""
        ...

    async def saved(self, *, wait: bool) -> list[Written] | None:
        """Return what was written, once all of it has arrived; until then None, unless ``wait``."""
        ...

    async def restore(self, url: str) -> None:
        """Read the state from a URL."""
        ...


class Checkpoints(StoredCheckpoints):
    """The checkpoints of a run in progress, of which the newest and the best are kept.

    Everything outside the learner is a pure function of the seed and the step: prompts, noise, ties and
    shuffles, and so the groups in flight, which a resumed run samples again. So a checkpoint is the learner's
    state, the step and a few counters; and, since checkpoints may outlive the run folder, what later steps
    are compared with: the metrics so far and the held-out scores at the start.
    """

    def __init__(
        self,
        url: str,
        keep: int,
        settings: dict[str, Any] | None = None,
        record: RunFolder | None = None,
        best_by: str = "",
    ) -> None:
        """Manage the checkpoints below a URL; ``keep`` remain, each with settings and parts of the record.

        Besides these the one with the highest value of the metric ``best_by`` remains, if there is such a
        metric after the step of a checkpoint.
        """
        super().__init__(url)
        self.best_by = best_by
        self.keep, self.settings, self.record = keep, settings or {}, record
        self.pending: tuple[int, int] | None = None

    async def commit(self, step: int, saver: Saver, *, empty_batches: int = 0) -> None:
        """Save the learner's state; the marker follows when all of it has arrived, see `settle`."""
        await self.settle(saver, wait=True)
        with self._writing(step):
            await asyncio.to_thread(self._clear, step)
            await saver.save(self.url(step))
        self.pending = step, empty_batches

    async def settle(self, saver: Saver, *, wait: bool) -> None:
        """Commit what was saved if all of it has arrived, and remove the oldest checkpoints."""
        if self.pending is None:
            return
        with self._writing(self.pending[0]):
            written = await saver.saved(wait=wait)
            if written is None:
                return
            await asyncio.to_thread(self._mark, *self.pending, written)
        self.pending = None

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Add to a failure the checkpoint that is left."""
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
        """Describe the space left on a local disk: a writer's own error about a full one is often obscure."""
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
            self.filesystem.rm_file(marker)  # first, so that half a checkpoint never counts as one
        self.filesystem.rm(self._path(step), recursive=True)

    def _mark(self, step: int, empty_batches: int, written: Sequence[Written]) -> None:
        self._check_visible(step, written)
        files = {name: entry for rank in written for name, entry in rank.files.items()} | self._keep(step)
        commit = Commit(
            step=step, empty_batches=empty_batches, files=files, settings=self.settings, packages=installed()
        )
        path = f"{self._path(step)}/{MARKER}"
        draft = f"{path}.part"
        self.filesystem.pipe_file(draft, to_marker(commit))
        self.filesystem.mv(draft, path)
        note("checkpoint committed", checkpoint=step)
        if older := self.steps()[: -self.keep]:
            best = self.best()
            for old in older:
                if old != best:
                    self._remove(old)

    def best(self) -> int | None:
        """Return the step with a checkpoint whose metric ``best_by`` is highest, the newest of equals."""
        history = self.record.history() if self.record else []
        values = {row["step"]: row.get(self.best_by) for row in history}
        known = [(values[step], step) for step in self.steps() if values.get(step) is not None]
        return max(known)[1] if known else None

    def _check_visible(self, step: int, written: Sequence[Written]) -> None:
        """Wait until this machine sees all files that the ranks have written.

        Raises:
            CheckpointError: if it does not: the ranks wrote to another folder of that name.
        """
        if not any(rank.files for rank in written):
            raise CheckpointError(f"checkpoint {self.url(step)}: no rank has written a file; {self._left()}")
        deadline = time.monotonic() + VISIBLE_WITHIN
        while invisible := self._invisible(step, written):
            if time.monotonic() >= deadline:
                raise CheckpointError(
                    f"checkpoint {self.url(step)}: {invisible}; all nodes must share this folder: put it on "
                    f"a shared file system, or name a URL with --checkpoints; {self._left()}"
                )
            time.sleep(0.5)

    def _invisible(self, step: int, written: Sequence[Written]) -> str:
        """Describe the files that a rank has written and this machine does not see; empty without any."""
        found = self._files(step)
        for rank in written:
            invisible = [name for name, entry in rank.files.items() if found.get(name) != entry.size]
            if invisible:
                name = invisible[0]
                return (
                    f"{rank.host} has written {len(rank.files)} files of which {socket.gethostname()} does "
                    f"not see {len(invisible)}, such as {name} ({found.get(name, 'no')} bytes, expected "
                    f"{rank.files[name].size})"
                )
        return ""

    def _keep(self, step: int) -> dict[str, Digest]:
        """Copy what a checkpoint keeps of the run folder, and return the digests of the copies."""
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

    def rewind(self, commit: Commit, folder: RunFolder) -> None:
        """Restore a run folder to its state after a checkpoint's step, even if it was lost and created anew.

        Checkpoints of older versions keep nothing of the folder; then only later records are removed from it.
        """
        for name in commit.files:
            if name.startswith(RECORD):
                content = self.filesystem.cat_file(f"{self._path(commit.step)}/{name}")
                write_bytes(folder.path / name.removeprefix(RECORD), content)
        folder.rewind(commit.step)

    async def restore(self, step: int, saver: Saver) -> None:
        """Load the checkpoint after a step into the learner."""
        await saver.restore(self.url(step))
        note("checkpoint restored", checkpoint=step)


def checkpoints_of(settings: RunSettings, folder: RunFolder) -> Checkpoints:
    """Open the checkpoints of a run: at its ``checkpoints`` URL, else in its folder."""
    place = settings.checkpoints or str(folder.checkpoints)
    values = settings.model_dump(mode="json")
    return Checkpoints(place, settings.keep_checkpoints, values, folder, best_by=settings.best_by)
