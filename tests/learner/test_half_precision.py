"""Learning in half precision: updates, and log-probs that sampler and learner compute alike."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.records import WeightsId
from tests.support.tiny_learner import (
    hand_over,
    learner_settings,
    model_settings,
    moved,
    rollout_settings,
    sample,
    sampler,
    start,
    update,
    weights,
)

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_learner_in_half_precision_updates_and_publishes(
    pipeline_folder: Path, dtype: str, lora_rank: int
) -> None:
    model = model_settings(pipeline_folder, dtype=dtype, lora_rank=lora_rank)
    rollout = rollout_settings(storage=dtype)
    batch, receiver = sample(model, rollout), sampler(model, rollout)
    worker = start(model, rollout, learner_settings(learning_rate=1e-3))
    before = weights(worker)
    metrics = update(worker, *batch.calls()[0])
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["ratio_max_deviation"] < 0.05
    assert metrics["skipped_updates"] == 0
    assert moved(weights(worker), before) > 1e-4
    assert hand_over(worker, receiver, version=1) == WeightsId(1)
    held = torch.cat([p.detach().float().flatten() for _, p in receiver.parameters])
    assert np.array_equal(held.numpy(), weights(worker))


def test_the_learner_may_make_the_old_log_probs_itself(pipeline_folder: Path) -> None:
    """So that what a sampler computed, here something wrong, cannot push ratios from one."""
    model, rollout = model_settings(pipeline_folder), rollout_settings()
    batch = sample(model, rollout)
    wrong = {
        key: replace(one, log_probs=one.log_probs + np.float32(0.01))
        for key, one in batch.trajectories.items()
    }
    found = {}
    for name, trajectories in (("sampler", wrong), ("learner", wrong), ("right", batch.trajectories)):
        source = "learner" if name == "learner" else "sampler"
        objective = {"name": "flow_grpo", "clip": 1e-3, "old_log_probs": source}
        learner = learner_settings(objective=objective, micro_batch=4, learning_rate=1e-3)
        worker = start(model, rollout, learner)
        metrics = update(worker, *replace(batch, trajectories=trajectories).calls()[0])
        found[name] = metrics, weights(worker)
    assert found["sampler"][0]["fresh_clip_fraction"] == 1
    assert found["learner"][0]["ratio_max_deviation"] == 0
    assert (
        found["learner"][0]["clip_fraction"] > 0
    )  # those of the second update are of the same, older policy
    assert moved(found["learner"][1], found["right"][1]) < 1e-5
    assert moved(found["sampler"][1], found["right"][1]) > 1e-4
