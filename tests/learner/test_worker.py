"""One rank in this process: the update against a plain loop, checkpoints, KL and adapters."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from numpy.typing import NDArray
from safetensors.torch import save_file

from learner.finite_check import not_finite
from rollout.families.transformer import adapter_off
from rollout.records import WeightsId
from rollout.tensors import unpack
from rollout.tools.export import write_lora
from rollout.weights import checksum, flatten
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
    update,
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
    mine = batch.calls(updates=updates)[0][0].shares
    for number, share in enumerate([*mine] * rounds, 1):
        total = torch.zeros(())
        for item in share:
            kept = batch.kept[item.trajectory]
            found = batch.trajectories[kept.group_id, kept.candidate]
            latents, texts = unpack(found.states).float(), batch.conditionings[kept.group_id].arrays
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


@pytest.mark.parametrize(("zero_stage", "micro_batch"), [(1, 100), (1, 4), (2, 5)])
def test_an_update_is_that_of_a_plain_loop(
    pipeline_folder: Path, batch: Batch, zero_stage: int, micro_batch: int
) -> None:
    learner = learner_settings(zero_stage=zero_stage, micro_batch=micro_batch, warmup=2, max_grad_norm=0.05)
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner)
    before = weights(worker)
    metrics = [update(worker, *batch.calls()[0]) for _ in range(5)]
    expected, norms = plain_update(
        pipeline_folder, batch, updates=2, rate=1e-4, warmup=2, max_norm=0.05, rounds=5
    )
    assert moved(weights(worker), before) > 3e-4
    assert moved(weights(worker), expected) < 1e-5
    assert max(norms) > 0.05 > min(norms)  # so some gradients were clipped and others were not
    means = [(a + b) / 2 for a, b in zip(norms[::2], norms[1::2], strict=True)]
    assert [m["grad_norm"] for m in metrics] == pytest.approx(means, rel=1e-3)
    assert [m["learning_rate"] for m in metrics[:2]] == pytest.approx([1e-4 * 2 / 3, 1e-4])
    assert worker.ping() == 10


@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance": 4.5}, {"dynamics": "cps"}, {"storage": "bfloat16"}, {"steps": 6, "window_size": 2}],
    ids=str,
)
def test_on_policy_the_ratio_is_one(pipeline_folder: Path, changes: dict[str, Any]) -> None:
    model, rollout = model_settings(pipeline_folder), rollout_settings(**changes)
    worker = start(model, rollout, learner_settings(updates=1))
    metrics = update(worker, *sample(model, rollout).calls(updates=1)[0])
    assert metrics["ratio_max_deviation"] <= 1e-5
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["clip_fraction"] == 0
    assert metrics["grad_norm"] > 0


def test_an_update_makes_good_candidates_likelier(pipeline_folder: Path, batch: Batch) -> None:
    """With ratios off one after an update, the loss on the same batch is lower than minus the advantages."""
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings(clip=0.5))
    first = update(worker, *batch.calls(updates=1)[0])
    second = update(worker, *batch.calls(updates=1)[0])
    assert second["loss"] < first["loss"] - 1e-5
    assert second["ratio_max_deviation"] > 1e-5


def test_gradient_checkpointing_changes_nothing(pipeline_folder: Path, batch: Batch) -> None:
    found = []
    for checkpointing in (False, True):
        learner = learner_settings(gradient_checkpointing=checkpointing)
        worker = start(model_settings(pipeline_folder), rollout_settings(), learner)
        update(worker, *batch.calls()[0])
        found.append(weights(worker))
    assert moved(*found) < 1e-6


def test_averaged_weights_are_the_average(pipeline_folder: Path, batch: Batch) -> None:
    worker = start(model_settings(pipeline_folder), rollout_settings(), learner_settings(updates=1))
    before = weights(worker)
    update(worker, *batch.calls(updates=1)[0])
    expected = before * (2 / 11) + weights(worker) * (9 / 11)
    assert moved(weights(worker, averaged=True), expected) < 1e-6
    ((other, _),) = worker.publish()
    ((digest, flat),) = worker.publish(averaged=True)
    assert digest == checksum(flat, worker.parameters) != other


def kl_of_two_batches(folder: Path, batch: Batch, rollout: Any, **changes: Any) -> list[float]:
    model = model_settings(folder, lora_rank=changes.pop("lora_rank", 0))
    worker = start(model, rollout, learner_settings(**changes))
    return [update(worker, *batch.calls(updates=1)[0])["kl"] for _ in range(2)]


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
            metrics = update(worker, *batch.calls(updates=1)[0])
        found.append(metrics["kl"])
    assert found[1] < 0.8 * found[0]


def test_only_the_adapter_travels_and_changes(pipeline_folder: Path) -> None:
    model, rollout = model_settings(pipeline_folder, lora_rank=4), rollout_settings()
    batch, receiver = sample(model, rollout), sampler(model, rollout)
    worker = start(model, rollout, learner_settings(learning_rate=1e-2))
    transformer = worker.policy.transformer
    frozen = {n: p.detach().clone() for n, p in transformer.named_parameters() if "lora_" not in n}
    before = weights(worker)
    assert update(worker, *batch.calls()[0])["ratio_max_deviation"] <= 1e-5
    after = weights(worker)
    assert before.size == sum(p.numel() for n, p in transformer.named_parameters() if "lora_" in n)
    assert moved(after, before) > 1e-3
    named = dict(transformer.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in frozen.items())

    assert hand_over(worker, receiver, version=1) == WeightsId(1)
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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_step_with_a_gradient_that_is_not_finite_is_not_applied(pipeline_folder: Path, dtype: str) -> None:
    model = model_settings(pipeline_folder, dtype=dtype)
    batch = sample(model, rollout_settings())
    worker = start(model, rollout_settings(), learner_settings(updates=1, learning_rate=1e-3))
    before = weights(worker)
    broken = {
        key: replace(found, log_probs=np.full_like(found.log_probs, np.nan))
        for key, found in batch.trajectories.items()
    }
    found = worker.update(*replace(batch, trajectories=broken).calls(updates=1)[0])
    assert found.metrics["skipped_updates"] == found.metrics["skipped_in_a_row"] == 1
    assert found.suspects == tuple(range(len(batch.kept)))
    assert not math.isfinite(found.metrics["loss"])
    assert worker.ping() == 0
    assert np.array_equal(weights(worker), before)
    assert math.isfinite(update(worker, *batch.calls(updates=1)[0])["grad_norm"])
    assert moved(weights(worker), before) > 1e-4
    assert np.isfinite(weights(worker)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": math.inf}, {"learning_rate": 3e38, "weight_decay": 1.0, "betas": (0.0, 0.999)}],
)
def test_weights_that_are_no_longer_finite_are_named(
    pipeline_folder: Path, dtype: str, changes: dict[str, Any]
) -> None:
    """A step that leaves what 32 bits can hold is as bad as one of an infinite rate."""
    model = model_settings(pipeline_folder, dtype=dtype)
    batch = sample(model, rollout_settings())
    fine = start(model, rollout_settings(), learner_settings(updates=1)).update(*batch.calls(updates=1)[0])
    assert (fine.broken, fine.metrics["updates"]) == ((), 1)
    learner = learner_settings(updates=1).model_copy(update=changes)
    worker = start(model, rollout_settings(), learner)
    found = worker.update(*batch.calls(updates=1)[0])
    assert found.metrics["skipped_updates"] == 0
    held = {name for name, p in worker.parameters if not p.isfinite().all()}
    assert set(found.broken) == held != set()


def test_the_padding_of_a_part_is_no_weight() -> None:
    """ZeRO-3 cuts seven values into two parts of four; the last place of the second holds anything."""
    values = torch.tensor([5.0, 6.0, 7.0, math.nan])
    parameter: Any = SimpleNamespace(ds_tensor=values, ds_numel=7)
    assert not_finite([("one", parameter)], rank=1) == ()
    assert not_finite([("one", parameter)], rank=0) == ("one",)
    assert not_finite([("none", SimpleNamespace(ds_tensor=values, ds_numel=3))], rank=1) == ()  # type: ignore[list-item]


def test_guards_ratio_is_one_on_policy_and_trains(pipeline_folder: Path) -> None:
    model = model_settings(pipeline_folder)
    worker = start(model, rollout_settings(), learner_settings(ratio="guard"))
    batch = sample(model, rollout_settings(), keeps=("states", "log_probs", "means"))
    before = weights(worker)
    metrics = update(worker, *batch.calls()[0])
    assert metrics["ratio_max_deviation"] <= 1e-5
    assert moved(weights(worker), before) > 1e-4
    again = update(worker, *batch.calls()[0])
    assert again["ratio_max_deviation"] > 1e-6


def test_training_starts_from_an_adapter_that_diffusers_saved(pipeline_folder: Path, tmp_path: Path) -> None:
    model, rollout = model_settings(pipeline_folder, lora_rank=4, lora_alpha=10), rollout_settings()
    first = start(model, rollout, learner_settings(learning_rate=1e-2))
    update(first, *sample(model, rollout).calls()[0])
    save_file({name: p.detach() for name, p in first.parameters}, tmp_path / "weights.safetensors")
    write_lora(tmp_path / "weights.safetensors", model, rollout, tmp_path / "adapter")
    continued = model_settings(pipeline_folder, lora_path=str(tmp_path / "adapter"))
    batch = sample(continued, rollout)
    second = start(continued, rollout, learner_settings(learning_rate=1e-2, beta=0.1))
    assert np.array_equal(weights(second), weights(first))
    assert second.policy.transformer.peft_config["default"].lora_alpha == 10
    metrics = update(second, *batch.calls(updates=1)[0])
    assert metrics["ratio_max_deviation"] <= 1e-5
    assert metrics["kl"] == pytest.approx(0, abs=1e-9)  # to where it started, not to the bare model
    assert moved(weights(second), weights(first)) > 1e-3
    assert update(second, *batch.calls(updates=1)[0])["kl"] > 1e-7


def test_an_adapter_that_is_none_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.lora_path: .*nowhere"):
        start(
            model_settings(pipeline_folder, lora_path=str(tmp_path / "nowhere")),
            rollout_settings(),
            learner_settings(),
        )


def test_advantages_are_cut_before_they_train(pipeline_folder: Path, batch: Batch) -> None:
    found = []
    for advantage in (3.0, 300.0):
        kept = [replace(k, advantage=math.copysign(advantage, k.advantage)) for k in batch.kept]
        worker = start(
            model_settings(pipeline_folder), rollout_settings(), learner_settings(advantage_clip=3.0)
        )
        update(worker, *replace(batch, kept=kept).calls()[0])
        found.append(weights(worker))
    assert np.array_equal(*found)
