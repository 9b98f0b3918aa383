"""Checkpoints of a learner, in a folder and in another store."""

from __future__ import annotations

import socket
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from learner.digests import digest, digests
from learner.records import Digest
from rollout.weights import flatten
from tests.support.tiny_learner import (
    Batch,
    learner_settings,
    model_settings,
    rollout_settings,
    start,
    timeless,
    update,
    weights,
)

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_restored_learner_continues_identically(
    pipeline_folder: Path, batch: Batch, tmp_path: Path, rank: int
) -> None:
    model, learner = model_settings(pipeline_folder, lora_rank=rank), learner_settings(warmup=3)
    worker = start(model, rollout_settings(), learner)
    update(worker, *batch.calls()[0])
    worker.save(str(tmp_path))
    saved = weights(worker), weights(worker, averaged=True)
    current = load_file(tmp_path / "weights.safetensors")
    assert np.array_equal(flatten(current[name] for name, _ in worker.parameters), saved[0])
    expected = update(worker, *batch.calls()[0])

    resumed = start(model, rollout_settings(), learner)
    resumed.restore(str(tmp_path))
    assert resumed.ping() == 2
    assert np.array_equal(weights(resumed), saved[0])
    assert np.array_equal(weights(resumed, averaged=True), saved[1])
    found = update(resumed, *batch.calls()[0])
    assert timeless(found) == timeless(expected)
    assert np.array_equal(weights(resumed), weights(worker))
    assert np.array_equal(weights(resumed, averaged=True), weights(worker, averaged=True))


def test_a_checkpoint_travels_to_another_store_while_training_goes_on(
    pipeline_folder: Path, batch: Batch
) -> None:
    url = "memory://somewhere/step-1"
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings())
    update(worker, *batch.calls()[0])
    worker.save(url)
    saved = weights(worker)
    update(worker, *batch.calls()[0])
    written = worker.saved(wait=True)
    assert written is not None
    with worker.storage.fetched(url) as fetched:
        assert digests(fetched) == written.files
    assert not list(Path(tempfile.gettempdir()).glob("checkpoint-*"))
    resumed = start(model_settings(pipeline_folder), rollout_settings(), learner_settings())
    resumed.restore(url)
    assert np.array_equal(weights(resumed), saved)
    update(resumed, *batch.calls()[0])
    assert np.array_equal(weights(resumed), weights(worker))


def test_a_save_says_what_it_wrote_and_leaves_nothing_else(pipeline_folder: Path, tmp_path: Path) -> None:
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings())
    with pytest.raises(RuntimeError, match="nothing has been saved"):
        worker.saved(wait=True)
    worker.save(str(tmp_path / "step-1"))
    written = worker.saved(wait=False)
    assert written is not None
    assert written.host == socket.gethostname()
    assert {"weights.safetensors", "average.safetensors", "learner.json", "latest"} < written.files.keys()
    assert digests(tmp_path / "step-1") == written.files
    assert {path.name for path in (tmp_path / "step-1").iterdir() if path.is_dir()} == {"engine"}


def test_a_digest_is_of_every_byte(tmp_path: Path) -> None:
    content = bytes(range(256)) * 200_000  # several chunks
    (tmp_path / "large").write_bytes(content)
    assert digest(tmp_path / "large") == Digest(size=len(content), crc32=f"{zlib.crc32(content):08x}")
    (tmp_path / "empty").touch()
    assert digest(tmp_path / "empty") == Digest(size=0, crc32="00000000")


def test_an_upload_that_fails_is_said(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("the bucket is full")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.put", refuse)
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings())
    worker.save("memory://full/step-1")
    with pytest.raises(OSError, match="bucket is full"):
        worker.saved(wait=True)


def test_nothing_to_resume_from_is_said(pipeline_folder: Path, tmp_path: Path) -> None:
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings())
    with pytest.raises(FileNotFoundError, match="no learner state"):
        worker.restore(str(tmp_path / "nothing"))
