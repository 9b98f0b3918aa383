"""Two ranks in processes of their own do what one does."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.learner.tiny import (
    Batch,
    free_port,
    learner_settings,
    model_settings,
    rollout_settings,
    run_rank,
    start,
    weights,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def ranks(pipeline_folder: Path, batch: Batch, checkpoint: Path) -> list[Any]:
    """What both ranks found; they leave a checkpoint."""
    port = free_port()
    work = [(rank, 2, port, str(pipeline_folder), batch, str(checkpoint)) for rank in range(2)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return pool.starmap_async(run_rank, work, chunksize=1).get(timeout=600)


@pytest.mark.usefixtures("process_group")
def test_two_ranks_train_the_same_weights_as_one(
    pipeline_folder: Path, batch: Batch, ranks: list[Any]
) -> None:
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings())
    before = weights(worker)
    expected = worker.update(*batch.calls()[0])
    _, found = ranks[0]["first"]
    assert np.abs(found - before).max() > 5e-5
    assert np.abs(found - weights(worker)).max() < 1e-6
    for name in ("loss", "ratio_mean", "clip_fraction", "kl", "grad_norm", "learning_rate"):
        assert ranks[0]["metrics"][name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6)


def test_both_ranks_report_the_same(ranks: list[Any]) -> None:
    first, second = ({**rank["metrics"], "seconds_learn": 0} for rank in ranks)
    assert first == second
    assert first["ratio_max_deviation"] <= 1e-5


def test_only_the_first_rank_publishes(ranks: list[Any]) -> None:
    assert ranks[0]["first"][1] is not None
    assert ranks[1]["first"] == ("", None)


def test_two_ranks_resume_identically(ranks: list[Any]) -> None:
    digest, flat = ranks[0]["second"]
    again, resumed = ranks[0]["resumed"]
    assert not np.array_equal(flat, ranks[0]["first"][1])
    assert np.array_equal(resumed, flat)
    assert again == digest


@pytest.mark.usefixtures("process_group", "ranks")
def test_another_number_of_ranks_cannot_resume(pipeline_folder: Path, checkpoint: Path) -> None:
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings())
    with pytest.raises(Exception, match="world size"):  # deepspeed's own type derives from nothing better
        worker.restore(str(checkpoint))
