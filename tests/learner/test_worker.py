"""One rank in this process: the update against a plain loop, checkpoints, KL and adapters."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from numpy.typing import NDArray

from rollout.adapter import adapter_off
from rollout.records import Weights
from rollout.tensors import checksum, flatten, unpack
from tests.learner.tiny import (
    Batch,
    learner_settings,
    model_settings,
    rollout_settings,
    sample,
    sampler,
    start,
    weights,
)

pytestmark = pytest.mark.usefixtures("process_group")


def plain_update(
    folder: Path, batch: Batch, *, updates: int, rate: float, warmup: int, max_norm: float, rounds: int
) -> tuple[NDArray[np.float32], list[float]]:
    """FlowGRPO in a plain loop, one trajectory and step at a time; only the split into updates is ours.

    Returns the weights, and the norm of every update's gradient: Adam itself is blind to a factor.
    """
    model = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=1e-4)
    schedule = sampler(model_settings(folder), rollout_settings()).policy.schedule(4)
    sigmas = schedule.sigmas.tolist()
    norms = []
    mine, *_ = batch.calls(updates=updates)[0]
    for number, share in enumerate(mine * rounds, 1):
        total = torch.zeros(())
        for item in share:
            kept = batch.kept[item.trajectory]
            found = batch.trajectories[kept.group_id, kept.candidate]
            latents, texts = unpack(found.latents).float(), batch.conditionings[kept.group_id].arrays
            for row, step in enumerate(found.steps):
                x, x_next, sigma, nxt = latents[row], latents[row + 1], sigmas[step], sigmas[step + 1]
                v = model(
                    hidden_states=x[None],
                    timestep=schedule.timesteps[step][None],
                    encoder_hidden_states=unpack(texts["hidden"])[None],
                    pooled_projections=unpack(texts["pooled"])[None],
                ).sample[0]
                s = 0.7 * math.sqrt(sigma / (1 - (nxt if sigma == 1 else sigma)))
                mean = x + (v + s * s / (2 * sigma) * (x + (1 - sigma) * v)) * (nxt - sigma)
                normal = torch.distributions.Normal(mean, s * math.sqrt(sigma - nxt))
                ratio = torch.exp(normal.log_prob(x_next).mean() - float(found.log_probs[row]))
                advantage = max(-5.0, min(5.0, kept.advantage))
                clipped = ratio.clamp(1 - 1e-3, 1 + 1e-3)
                loss = torch.maximum(-advantage * ratio, -advantage * clipped)
                total = total + loss / (len(share) * len(found.steps))
        optimizer.param_groups[0]["lr"] = rate * min(1.0, number / (warmup + 1))
        optimizer.zero_grad()
        total.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
    return flatten(model.parameters()), norms


def moved(after: NDArray[np.float32], before: NDArray[np.float32]) -> float:
    return float(np.abs(after - before).max())


@pytest.mark.parametrize(("zero_stage", "micro_batch"), [(1, 100), (1, 4), (2, 5)])
def test_an_update_is_that_of_a_plain_loop(
    pipeline_folder: Path, batch: Batch, zero_stage: int, micro_batch: int
) -> None:
    learner = learner_settings(zero_stage=zero_stage, micro_batch=micro_batch, warmup=2, max_grad_norm=0.05)
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner)
    before = weights(worker)
    metrics = [worker.update(*batch.calls()[0]) for _ in range(2)]
    expected, norms = plain_update(
        pipeline_folder, batch, updates=2, rate=1e-4, warmup=2, max_norm=0.05, rounds=2
    )
    assert moved(weights(worker), before) > 1e-4
    assert moved(weights(worker), expected) < 1e-6
    assert min(norms) > 0.05  # so the gradients were clipped
    assert [m["grad_norm"] for m in metrics] == pytest.approx(
        [sum(norms[:2]) / 2, sum(norms[2:]) / 2], rel=1e-4
    )
    assert [m["learning_rate"] for m in metrics] == pytest.approx([1e-4 * 2 / 3, 1e-4])
    assert worker.ping() == 4


@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance": 4.5}, {"dynamics": "cps"}, {"storage": "bfloat16"}, {"steps": 6, "window_size": 2}],
    ids=str,
)
def test_on_policy_the_ratio_is_one(pipeline_folder: Path, changes: dict[str, Any]) -> None:
    model, rollout = model_settings(pipeline_folder), rollout_settings(**changes)
    worker = start(model, rollout, learner_settings(updates=1))
    metrics = worker.update(*sample(model, rollout).calls(updates=1)[0])
    assert metrics["ratio_max_deviation"] <= 1e-5
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["clip_fraction"] == 0
    assert metrics["grad_norm"] > 0


def test_an_update_makes_good_candidates_likelier(pipeline_folder: Path, batch: Batch) -> None:
    """With ratios off one after an update, the loss on the same batch is lower than minus the advantages."""
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings(clip=0.5))
    first = worker.update(*batch.calls(updates=1)[0])
    second = worker.update(*batch.calls(updates=1)[0])
    assert second["loss"] < first["loss"] - 1e-5
    assert second["ratio_max_deviation"] > 1e-5


def test_gradient_checkpointing_changes_nothing(pipeline_folder: Path, batch: Batch) -> None:
    found = []
    for checkpointing in (False, True):
        learner = learner_settings(gradient_checkpointing=checkpointing)
        worker = start(model_settings(pipeline_folder), rollout_settings(), learner)
        worker.update(*batch.calls()[0])
        found.append(weights(worker))
    assert moved(*found) < 1e-6


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_restored_learner_continues_identically(
    pipeline_folder: Path, batch: Batch, tmp_path: Path, rank: int
) -> None:
    model, learner = model_settings(pipeline_folder, lora_rank=rank), learner_settings(warmup=3)
    worker = start(model, rollout_settings(), learner)
    worker.update(*batch.calls()[0])
    worker.save(str(tmp_path))
    saved = weights(worker), weights(worker, averaged=True)
    expected = worker.update(*batch.calls()[0])

    resumed = start(model, rollout_settings(), learner)
    resumed.restore(str(tmp_path))
    assert resumed.ping() == 2
    assert np.array_equal(weights(resumed), saved[0])
    assert np.array_equal(weights(resumed, averaged=True), saved[1])
    found = resumed.update(*batch.calls()[0])
    assert {**found, "seconds_learn": 0} == {**expected, "seconds_learn": 0}
    assert np.array_equal(weights(resumed), weights(worker))
    assert np.array_equal(weights(resumed, averaged=True), weights(worker, averaged=True))


def test_nothing_to_resume_from_is_said(pipeline_folder: Path, tmp_path: Path) -> None:
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings())
    with pytest.raises(FileNotFoundError, match="no learner state"):
        worker.restore(str(tmp_path / "nothing"))


def test_averaged_weights_are_the_average(pipeline_folder: Path, batch: Batch) -> None:
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings(updates=1))
    before = weights(worker)
    worker.update(*batch.calls(updates=1)[0])
    expected = before * (2 / 11) + weights(worker) * (9 / 11)
    assert moved(weights(worker, averaged=True), expected) < 1e-6
    digest, flat = worker.publish(averaged=True)
    assert digest == checksum(flat, worker.parameters) != worker.publish()[0]


def kl_of_two_batches(folder: Path, batch: Batch, rollout: Any, **changes: Any) -> list[float]:
    model = model_settings(folder, lora_rank=changes.pop("lora_rank", 0))
    worker = start(model, rollout, learner_settings(**changes))
    return [worker.update(*batch.calls(updates=1)[0])["kl"] for _ in range(2)]


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_the_kl_starts_at_zero_and_rises(pipeline_folder: Path, batch: Batch, lora_rank: int) -> None:
    first, second = kl_of_two_batches(
        pipeline_folder, batch, rollout_settings(), beta=0.1, lora_rank=lora_rank
    )
    assert first == pytest.approx(0, abs=1e-9)
    assert second > 1e-7


def test_flow_grpos_kl_is_the_true_one_times_the_step(pipeline_folder: Path) -> None:
    model, rollout = model_settings(pipeline_folder), rollout_settings(window_start=1, window_stop=2)
    batch = sample(model, rollout)
    gaussian, upstream = (
        kl_of_two_batches(pipeline_folder, batch, rollout, beta=0.1, kl=kind)[1]
        for kind in ("gaussian", "flow_grpo")
    )
    sigmas = sampler(model, rollout).policy.schedule(4).sigmas
    assert upstream == pytest.approx(gaussian * (sigmas[1] - sigmas[2]).item(), rel=1e-2)


def test_a_strong_kl_holds_the_policy_back(pipeline_folder: Path, batch: Batch) -> None:
    found = []
    for beta in (1e-6, 1e3):
        worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings(beta=beta))
        for _ in range(4):
            metrics = worker.update(*batch.calls(updates=1)[0])
        found.append(metrics["kl"])
    assert found[1] < 0.8 * found[0]


def test_only_the_adapter_travels_and_changes(pipeline_folder: Path) -> None:
    model, rollout = model_settings(pipeline_folder, lora_rank=4), rollout_settings()
    batch, receiver = sample(model, rollout), sampler(model, rollout)
    worker = start(model, rollout, learner_settings(learning_rate=1e-2))
    transformer = worker.policy.transformer
    frozen = {n: p.detach().clone() for n, p in transformer.named_parameters() if "lora_" not in n}
    before = weights(worker)
    assert worker.update(*batch.calls()[0])["ratio_max_deviation"] <= 1e-5
    after = weights(worker)
    assert before.size == sum(p.numel() for n, p in transformer.named_parameters() if "lora_" in n)
    assert moved(after, before) > 1e-3
    named = dict(transformer.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in frozen.items())

    digest, flat = worker.publish()
    assert receiver.load(Weights(version=1, checksum=digest, flat=None), flat) == 1
    base = SD3Transformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
    inputs = {
        "hidden_states": torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": unpack(batch.conditionings[0].arrays["hidden"])[None],
        "pooled_projections": unpack(batch.conditionings[0].arrays["pooled"])[None],
    }
    with torch.no_grad():
        original, adapted = base(**inputs).sample, transformer(**inputs).sample
        with adapter_off(transformer):
            assert torch.allclose(transformer(**inputs).sample, original, atol=1e-6)
        assert torch.equal(receiver.policy.transformer(**inputs).sample, adapted)
    assert (adapted - original).abs().max() > 1e-4


def test_a_bfloat16_learner_updates_and_publishes(pipeline_folder: Path) -> None:
    model = model_settings(pipeline_folder, dtype="bfloat16")
    rollout = rollout_settings(storage="bfloat16")
    batch, receiver = sample(model, rollout), sampler(model, rollout)
    worker = start(model, rollout, learner_settings(learning_rate=1e-3))
    before = weights(worker)
    metrics = worker.update(*batch.calls()[0])
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["ratio_max_deviation"] < 0.05
    digest, flat = worker.publish()
    assert flat is not None
    assert moved(flat, before) > 1e-4
    assert receiver.load(Weights(version=1, checksum=digest, flat=None), flat) == 1
    assert np.array_equal(flatten([p for _, p in receiver.parameters]), flat)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_with_a_gradient_that_is_not_finite_is_not_applied(pipeline_folder: Path, dtype: str) -> None:
    model = model_settings(pipeline_folder, dtype=dtype)
    batch = sample(model, rollout_settings())
    worker = start(model, rollout_settings(), learner_settings(updates=1, learning_rate=1e-3))
    before = weights(worker)
    broken = {
        key: replace(found, log_probs=np.full_like(found.log_probs, np.nan))
        for key, found in batch.trajectories.items()
    }
    metrics = worker.update(*replace(batch, trajectories=broken).calls(updates=1)[0])
    assert not math.isfinite(metrics["loss"])
    assert not math.isfinite(metrics["grad_norm"])
    assert np.array_equal(weights(worker), before)
    assert math.isfinite(worker.update(*batch.calls(updates=1)[0])["grad_norm"])
    assert moved(weights(worker), before) > 1e-4
    assert np.isfinite(weights(worker)).all()


def test_advantages_are_cut_before_they_train(pipeline_folder: Path, batch: Batch) -> None:
    found = []
    for advantage in (3.0, 300.0):
        kept = [replace(k, advantage=math.copysign(advantage, k.advantage)) for k in batch.kept]
        worker = start(
            model_settings(pipeline_folder), rollout_settings(), learner_settings(advantage_clip=3.0)
        )
        worker.update(*replace(batch, kept=kept).calls()[0])
        found.append(weights(worker))
    assert np.array_equal(*found)
