"""Updates by objectives on the forward process: any candidates, the behaviour policy, and exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.objectives.registry import load_objective, objective_settings
from rollout.records import Keep
from tests.support.tiny_learner import (
    Batch,
    hand_over,
    learner_settings,
    model_settings,
    moved,
    rollout_settings,
    sample,
    sampler,
    start,
    timeless,
    update,
    weights,
)

pytestmark = pytest.mark.usefixtures("process_group")
CLEAN: tuple[Keep, ...] = ("clean",)
LAGGING = {"name": "nft", "behaviour_decay": 0.5, "behaviour_ramp": 0.1}


def made(folder: Path, dynamics: str, **model: Any) -> Batch:
    return sample(model_settings(folder, **model), rollout_settings(dynamics=dynamics), keeps=CLEAN)


@pytest.fixture(scope="module")
def ode(pipeline_folder: Path) -> Batch:
    return made(pipeline_folder, "ode")


def calls(batch: Batch, section: dict[str, Any], **options: Any) -> Any:
    return batch.calls(objective=load_objective(objective_settings(section)), **options)[0]


@pytest.mark.parametrize("dynamics", ["sde", "cps", "ode"])
@pytest.mark.parametrize("name", ["nft", "awm", "dpo"])
def test_candidates_of_any_dynamics_teach(pipeline_folder: Path, name: str, dynamics: str) -> None:
    section = {"name": name, "kl_weight": 0.1}
    rollout = rollout_settings(dynamics=dynamics)
    worker = start(model_settings(pipeline_folder), rollout, learner_settings(objective=section))
    before, batch = weights(worker), made(pipeline_folder, dynamics)
    found = [update(worker, *calls(batch, section)) for _ in range(2)]
    assert moved(weights(worker), before) > 1e-5
    assert found[0]["grad_norm"] > 0
    assert found[1]["kl"] > 0
    assert found[0]["matching_error"] > 0
    assert any(key.startswith("matching_error.t") for key in found[0])
    if name != "dpo":
        assert found[0]["moved"] > 0  # by the second optimizer step of the batch


@pytest.mark.parametrize("model", [{}, {"lora_rank": 4}, {"dtype": "bfloat16", "lora_rank": 4}], ids=str)
@pytest.mark.parametrize("name", ["nft", "awm"])
def test_before_the_first_step_the_policy_is_the_behaviour_policy(
    pipeline_folder: Path, name: str, model: dict[str, Any]
) -> None:
    section = {"name": name}
    worker = start(
        model_settings(pipeline_folder, **model), rollout_settings(), learner_settings(objective=section)
    )
    batch = made(pipeline_folder, "sde", **model)
    assert update(worker, *calls(batch, section, updates=1))["moved"] == 0
    assert update(worker, *calls(batch, section, updates=1))["moved"] == 0


def test_passes_of_the_behaviour_policy_change_no_gradient(pipeline_folder: Path, ode: Batch) -> None:
    """Known velocities of the same weights are those that the first share computes itself."""
    shared = {"name": "nft", "shared_noise": "none"}
    lagging = shared | {"behaviour_decay": 0.9, "behaviour_ramp": 1e-9}
    found = []
    for section in (shared, lagging):
        worker = start(
            model_settings(pipeline_folder), rollout_settings(), learner_settings(objective=section)
        )
        metrics = update(worker, *calls(ode, section, updates=1))
        found.append(({k: v for k, v in timeless(metrics).items() if k != "moved"}, weights(worker)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)


def test_the_samplers_get_the_behaviour_policy_and_evaluations_the_average(
    pipeline_folder: Path, ode: Batch
) -> None:
    section = {"name": "nft", "behaviour_decay": 0.75, "behaviour_ramp": 100}
    model, learner = model_settings(pipeline_folder), learner_settings(objective=section, ema_decay=0)
    worker = start(model, rollout_settings(), learner)
    before = weights(worker)
    update(worker, *calls(ode, section))
    policy, behaviour = weights(worker, averaged=True), weights(worker)  # without decay the average is it
    assert np.allclose(behaviour, 0.75 * before + 0.25 * policy, atol=1e-6)
    receiver = sampler(model, rollout_settings())
    hand_over(worker, receiver, 1)
    held = np.concatenate([p.detach().flatten().numpy() for _, p in receiver.parameters])
    assert np.array_equal(held, behaviour)
    metrics = update(worker, *calls(ode, section, updates=1))
    assert metrics["moved"] > 0  # also in the first optimizer step


@pytest.mark.parametrize(
    ("section", "model"),
    [(LAGGING, {}), (LAGGING, {"lora_rank": 4}), ({"name": "awm"}, {}), ({"name": "dpo"}, {"lora_rank": 4})],
    ids=["nft", "nft, lora", "awm", "dpo, lora"],
)
def test_a_restored_learner_continues_identically(
    pipeline_folder: Path, tmp_path: Path, section: dict[str, Any], model: dict[str, Any]
) -> None:
    batch = made(pipeline_folder, "ode", **model)
    settings = (
        model_settings(pipeline_folder, **model),
        rollout_settings(),
        learner_settings(objective=section),
    )
    worker = start(*settings)
    for _ in range(2):
        update(worker, *calls(batch, section))
    worker.save(str(tmp_path))
    saved = weights(worker), weights(worker, averaged=True)
    expected = [timeless(update(worker, *calls(batch, section))) for _ in range(2)]

    resumed = start(*settings)
    resumed.restore(str(tmp_path))
    assert np.array_equal(weights(resumed), saved[0])
    assert np.array_equal(weights(resumed, averaged=True), saved[1])
    assert [timeless(update(resumed, *calls(batch, section))) for _ in range(2)] == expected
    assert np.array_equal(weights(resumed), weights(worker))
    assert np.array_equal(weights(resumed, averaged=True), weights(worker, averaged=True))


def test_a_checkpoint_without_the_behaviour_policy_is_refused(
    pipeline_folder: Path, tmp_path: Path, ode: Batch
) -> None:
    settings = model_settings(pipeline_folder), rollout_settings()
    worker = start(*settings, learner_settings(objective={"name": "nft"}))
    worker.save(str(tmp_path))
    lagging = start(*settings, learner_settings(objective=LAGGING))
    with pytest.raises(FileNotFoundError, match=r"no learner state .*: behaviour.safetensors is missing"):
        lagging.restore(str(tmp_path))


def test_the_size_of_mini_batches_changes_only_rounding(pipeline_folder: Path, ode: Batch) -> None:
    found = []
    for size in (2, 100):
        section = {"name": "dpo", "draws": 3}
        worker = start(
            model_settings(pipeline_folder),
            rollout_settings(),
            learner_settings(objective=section, micro_batch=size),
        )
        found.append(timeless(update(worker, *calls(ode, section))))
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-6)
