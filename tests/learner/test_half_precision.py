"""Learning in half precision: updates, and log-probs that sampler and learner compute alike."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from cluster.config.sources import preset_names, resolve
from learner.objectives.flow_grpo import FlowGRPO, FlowGRPOSettings
from learner.objectives.registry import load_objective
from rollout.records import WeightsId
from tests.support.paths import ROOT
from tests.support.summation import load_rounding_policy
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


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_float32_model_convolves_in_float32_on_a_gpu(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Torch's default is TF32, which has float16's ten bits; matrix products are exact by default."""
    model, rollout = model_settings(pipeline_folder, dtype=dtype), rollout_settings()
    for load in (lambda: sampler(model, rollout), lambda: start(model, rollout, learner_settings())):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", dtype == "float32")
        load()
        assert torch.backends.cudnn.allow_tf32 is (dtype != "float32")
    assert not torch.backends.cuda.matmul.allow_tf32


def bundled(folder: Path) -> Path:
    """The bundled model with SD3's own schedule, shifted by 3."""
    shutil.copytree(ROOT / "rollout" / "tiny" / "shapes", folder)
    shutil.rmtree(folder / "scheduler")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return folder


def fresh(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, micro_batch: int, objective: dict[str, Any], dtype: str,
    **changes: Any,
) -> dict[str, float]:  # fmt: skip
    """The metrics of fresh candidates, where sums depend on the number of rows as on a GPU: odd or even."""
    monkeypatch.setattr("rollout.worker.load_policy", load_rounding_policy)
    monkeypatch.setattr("learner.worker.load_policy", load_rounding_policy)
    model = model_settings(folder, dtype=dtype, lora_rank=8)
    rollout = rollout_settings(**{"steps": 10, "guidance": 4.5, "batch": 12} | changes)
    learner = learner_settings(updates=1, micro_batch=micro_batch, objective=objective)
    found = sample(model, rollout, keeps=load_objective(learner.objective).keeps, candidates=12)
    kept = [one for one in found.kept if one.group_id == 0]  # twelve candidates: whole passes of twelve
    return update(start(model, rollout, learner), *replace(found, kept=kept).calls(updates=1)[0])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_old_log_probs_of_the_learner_are_the_same_under_every_stage_of_zero(
    pipeline_folder: Path, stage: int
) -> None:
    """Their passes record gradients that no backward pass follows, which ZeRO-3's hooks have to survive."""
    model, rollout = model_settings(pipeline_folder), rollout_settings()
    batch, found = sample(model, rollout), []
    for zero_stage in (0, stage):
        objective = {"name": "flow_grpo", "clip": 1e-3, "old_log_probs": "learner"}
        learner = learner_settings(
            objective=objective, micro_batch=4, learning_rate=1e-3, zero_stage=zero_stage
        )
        worker = start(model, rollout, learner)
        metrics = [update(worker, *batch.calls()[0]) for _ in range(2)]
        found.append((weights(worker), [one["loss"] for one in metrics]))
    (plain, losses), (sharded, again) = found
    assert losses == pytest.approx(again, rel=1e-4)
    assert moved(plain, sharded) < 1e-5


def by_step(metrics: dict[str, float], name: str) -> list[float]:
    return [abs(value) for key, value in metrics.items() if key.startswith(f"{name}.t")]


ON_GPUS = [name for name in preset_names() if resolve(name, {}).rollout.gpus]


@pytest.mark.parametrize(
    "name", [name for name in ON_GPUS if resolve(name, {}).learner.objective.name == "flow_grpo"]
)
def test_with_a_presets_settings_rounding_leaves_the_clip_range_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every trained step the mean log-ratio of fresh candidates is within a quarter of the clip range."""
    settings = resolve(name, {})
    rollout, objective = settings.rollout, cast(Any, settings.learner.objective)
    same = {"steps": rollout.steps, "dynamics": rollout.dynamics, "noise_level": rollout.noise_level}
    equal = settings.learner.micro_batch == rollout.batch  # here both twelve
    assert equal or objective.old_log_probs == "learner"
    metrics = fresh(
        bundled(tmp_path / "model"), monkeypatch, micro_batch=12, dtype=settings.model.dtype,
        guidance=rollout.guidance, storage=rollout.storage,
        objective=objective.model_copy(update={"beta": 0.0}).model_dump(), **same,
    )  # fmt: skip
    trained = 3 if rollout.dynamics == "cps" else rollout.trained_steps
    assert len(by_step(metrics, "log_ratio")) == trained
    assert max(by_step(metrics, "log_ratio_rms")) <= objective.clip / 4
    assert metrics["grad_norm"] > 0


def test_with_passes_of_another_size_it_does_not_and_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, clip = bundled(tmp_path / "model"), {"name": "flow_grpo", "clip": 1e-4}
    half = fresh(folder, monkeypatch, micro_batch=5, objective=clip, dtype="float16")
    objective = FlowGRPO(FlowGRPOSettings(clip=1e-4))
    assert max(by_step(half, "log_ratio")) > 2.5e-5
    assert "set learner.micro_batch to rollout.batch" in objective.doubts(half, on_policy=True)
    rough = fresh(folder, monkeypatch, micro_batch=5, objective=clip, dtype="bfloat16")
    assert "most candidates have no gradient" in objective.healthy(rough, on_policy=True, dtype="bfloat16")
    own = {**clip, "old_log_probs": "learner"}
    assert (
        max(
            by_step(
                fresh(folder, monkeypatch, micro_batch=5, objective=own, dtype="bfloat16"), "log_ratio_rms"
            )
        )
        == 0
    )
