"""What a learner writes and reads again, in a folder or in another store."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from rollout.tensors import flatten
from tests.learner.tiny import (
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
    assert worker.saved(wait=True)
    assert not list(Path(tempfile.gettempdir()).glob("checkpoint-*"))
    resumed = start(model_settings(pipeline_folder), rollout_settings(), learner_settings())
    resumed.restore(url)
    assert np.array_equal(weights(resumed), saved)
    update(resumed, *batch.calls()[0])
    assert np.array_equal(weights(resumed), weights(worker))


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
