"""Checkpoints: the commit marker is written last, and its presence is the checkpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil
from fsspec.core import open_local, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from cluster.errors import UserError
from cluster.events import note
from cluster.learners import Learner, LearnerError
from cluster.run_folder import RunFolder
from cluster.settings import RunSettings

MARKER: Final = "COMMITTED"
PACKAGES: Final = ("torch", "deepspeed", "diffusers", "transformers", "peft", "ray", "numpy")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, most likely since the disk is full; the older ones are untouched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a marker says: the sizes of all files, the run's configuration, its counters and its packages."""

    step: int
    empty_batches: int
    files: dict[str, int]
    settings: dict[str, Any]
    packages: dict[str, str]


class Checkpoints:
    """The checkpoints of a run, in a folder or at any fsspec URL, newest kept.

    Everything outside the learner is a pure function of the seed and the step: prompts, noise, ties and
    shuffles, and so the groups in flight, which a resumed run samples again. The learner's state, the step
    and a few counters are all there is to save.
    """

    def __init__(self, url: str, keep: int, settings: dict[str, Any] | None = None) -> None:
        """Manage the checkpoints below a URL; ``keep`` survive; ``settings`` are recorded with each."""
        self.filesystem, self.root = url_to_fs(url)
        self.keep, self.settings = keep, settings or {}
        self.pending: tuple[int, int] | None = None

    def url(self, step: int) -> str:
        """Where the checkpoint after a step lies."""
        return str(self.filesystem.unstrip_protocol(self._path(step)))

    def _path(self, step: int) -> str:
        return f"{self.root}/step-{step}"

    def steps(self) -> list[int]:
        """The steps with a committed checkpoint, oldest first."""
        self.filesystem.invalidate_cache()
        found = self.filesystem.glob(f"{self.root}/step-*/{MARKER}")
        return sorted(int(str(path).split("/")[-2].removeprefix("step-")) for path in found)

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
            if not await learner.saved(wait=wait):
                return
            await asyncio.to_thread(self._mark, *self.pending)
        self.pending = None

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Say of what could not be written which checkpoint is left."""
        try:
            yield
        except (OSError, LearnerError) as error:
            last = max(self.steps(), default=0)
            left = f"--resume continues from step {last}" if last else "there is no older one"
            raise CheckpointError(
                f"checkpoint {self.url(step)} could not be written: {error}{self._room()}; {left}"
            ) from error

    def _room(self) -> str:
        """What is free on a disk of this machine; what a writer says of a full one is often obscure."""
        if not isinstance(self.filesystem, LocalFileSystem) or not self.filesystem.exists(self.root):
            return ""
        return f" ({psutil.disk_usage(self.root).free / 1e9:.2f} GB are free there)"

    def _clear(self, step: int) -> None:
        if self.filesystem.exists(self._path(step)):
            self._remove(step)
        self.filesystem.makedirs(self._path(step), exist_ok=True)

    def _remove(self, step: int) -> None:
        marker = f"{self._path(step)}/{MARKER}"
        if self.filesystem.exists(marker):
            self.filesystem.rm_file(marker)  # first, so that half a checkpoint never looks like one
        self.filesystem.rm(self._path(step), recursive=True)

    def _mark(self, step: int, empty_batches: int) -> None:
        marker = {
            "step": step,
            "empty_batches": empty_batches,
            "files": self._files(step),
            "settings": self.settings,
            "packages": installed(),
        }
        path = f"{self._path(step)}/{MARKER}"
        draft = f"{path}.part"
        self.filesystem.pipe_file(draft, json.dumps(marker).encode())
        self.filesystem.mv(draft, path)
        note("checkpoint committed", checkpoint=step)
        for old in self.steps()[: -self.keep]:
            self._remove(old)

    def _files(self, step: int) -> dict[str, int]:
        self.filesystem.invalidate_cache()
        found = self.filesystem.find(self._path(step), detail=True)
        prefix = f"{self._path(step)}/"
        return {path.removeprefix(prefix): int(entry["size"]) for path, entry in found.items()}

    def read(self, step: int) -> Commit:
        """What the marker of a checkpoint says.

        Raises:
            UserError: if the marker cannot be read, or files are missing or cut short.
        """
        path = f"{self._path(step)}/{MARKER}"
        try:
            commit = Commit(**json.loads(self.filesystem.cat_file(path)))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is no marker of a checkpoint: {error}") from None
        found = self._files(step)
        for name, size in commit.files.items():
            if found.get(name) != size:
                raise UserError(
                    f"{self._path(step)}/{name} has {found.get(name, 'no')} bytes, expected {size}: "
                    "the checkpoint is damaged; remove its folder to resume from the one before"
                )
        return commit

    def file(self, step: int, name: str) -> Path:
        """A file of a checkpoint as a local one, fetched if it lies elsewhere.

        Raises:
            FileNotFoundError: if the checkpoint has no such file.
        """
        url = f"{self.url(step)}/{name}"
        if not self.filesystem.exists(f"{self._path(step)}/{name}"):
            raise FileNotFoundError(f"the checkpoint has no {url}")
        return Path(
            open_local(url if isinstance(self.filesystem, LocalFileSystem) else f"simplecache::{url}")
        )

    async def restore(self, step: int, learner: Learner) -> None:
        """Load the checkpoint after a step into the learner."""
        await learner.restore(self.url(step))
        note("checkpoint restored", checkpoint=step)


def checkpoints_of(settings: RunSettings, folder: RunFolder) -> Checkpoints:
    """The checkpoints of a run: where it says, or in its folder."""
    place = settings.checkpoints or str(folder.checkpoints)
    return Checkpoints(place, settings.keep_checkpoints, settings.model_dump(mode="json"))


def installed() -> dict[str, str]:
    """The versions of the packages that the numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
