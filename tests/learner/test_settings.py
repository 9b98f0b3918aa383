"""The number of pairs in a forward pass of the learner."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.settings import LearnerSettings
from tests.support.tiny_learner import (
    Batch,
    learner_settings,
    model_settings,
    rollout_settings,
    start,
    timeless,
    update,
)


@pytest.mark.parametrize(("tokens", "pairs"), [(1024, 8), (16, 512), (4096, 2), (10**6, 1)])
def test_a_forward_holds_a_number_of_tokens(tokens: int, pairs: int) -> None:
    assert LearnerSettings().pairs(tokens) == pairs
    assert LearnerSettings(micro_batch=3).pairs(tokens) == 3


@pytest.mark.usefixtures("process_group")
def test_the_update_does_not_depend_on_it(pipeline_folder: Path, batch: Batch) -> None:
    forwards, found = [], []
    for micro_batch in (None, 4):
        settings = learner_settings(micro_batch=micro_batch, updates=1)
        worker = start(model_settings(pipeline_folder), rollout_settings(), settings)
        calls: list[int] = []
        worker.policy.transformer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(timeless(update(worker, *batch.calls(updates=1)[0])))
        forwards.append(len(calls))
    assert forwards == [1, 6]  # seven trajectories of three steps
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)
