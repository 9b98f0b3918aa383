"""Learners that save and do nothing else, and damage to what they have saved."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from typing import Any

from fsspec.core import url_to_fs

from cluster.record.checkpoints import Checkpoints
from learner.digests import crc32
from learner.records import Digest, Written

FILES = {"engine/rank-0": b"moments", "weights": b"some weights"}


def written_at(url: str, host: str = "here") -> list[Written]:
    """What a single rank reports that has written all that lies at a URL."""
    filesystem, path = url_to_fs(url)
    contents = {name.removeprefix(f"{path}/"): filesystem.cat_file(name) for name in filesystem.find(path)}
    return [Written(host=host, files=digests_of(contents))]


def digests_of(contents: Mapping[str, bytes]) -> dict[str, Digest]:
    return {name: Digest(size=len(c), crc32=crc32(io.BytesIO(c))) for name, c in contents.items()}


class SavingLearner:
    """Saves a few small files, the URL among them, and remembers from where it was restored."""

    def __init__(self) -> None:
        self.url = self.restored = ""

    async def save(self, url: str) -> None:
        self.url = url
        filesystem, path = url_to_fs(url)
        for name, content in {**FILES, "url": url.encode()}.items():
            filesystem.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
            filesystem.pipe_file(f"{path}/{name}", content)

    async def saved(self, *, wait: bool) -> list[Written]:
        return written_at(self.url)

    async def restart(self) -> None: ...

    async def restore(self, url: str) -> None:
        self.restored = url


def commit(checkpoints: Checkpoints, *steps: int, learner: Any = None) -> None:
    """Save and commit checkpoints after some steps."""
    saving = learner or SavingLearner()

    async def all_of_them() -> None:
        for step in steps:
            await checkpoints.commit(step, saving)
            await checkpoints.settle(saving, wait=True)

    asyncio.run(all_of_them())


def flip(checkpoints: Checkpoints, step: int, name: str, bit: int = 20) -> None:
    """Flip one bit of a file of a checkpoint; its size stays."""
    path = f"{checkpoints.root}/step-{step}/{name}"
    content = bytearray(checkpoints.filesystem.cat_file(path))
    content[bit // 8] ^= 1 << bit % 8
    checkpoints.filesystem.pipe_file(path, bytes(content))
