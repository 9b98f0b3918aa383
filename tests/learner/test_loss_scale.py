"""The scale of a loss in float16: gradients keep their digits, and an overflow lowers it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from learner.loss_scale import LOWERED_BY, RAISED_AFTER, LossScale
from tests.support.tiny_learner import learner_settings, model_settings, rollout_settings, start

NUMEL, WEIGHT = 16 * 64 * 64, 1 / 1728


def gradient(dtype: str, compute: torch.dtype, lowered: int = 0) -> torch.Tensor:
    """The gradient of a weighted mean over an image's dimensions, with a layer in the middle."""
    parameter = nn.Parameter(torch.linspace(-1, 1, 64))
    scale = LossScale([("w", parameter)], dtype)
    scale.lowered = lowered
    prediction = (parameter.to(compute) * torch.ones(NUMEL // 64, 64, dtype=compute)).float()
    (WEIGHT * prediction.square().mean() * scale.set(NUMEL, WEIGHT)).backward()
    assert parameter.grad is not None
    return parameter.grad


def test_gradients_too_small_for_float16_arrive() -> None:
    exact = gradient("float32", torch.float32)
    assert torch.allclose(gradient("float16", torch.float16), exact, rtol=2e-3, atol=0)
    unscaled = gradient("float32", torch.float16)  # what float16 would do to them
    assert (unscaled == 0).all()
    assert exact.abs().min() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_precisions_are_left_alone(dtype: str) -> None:
    scale = LossScale([("w", nn.Parameter(torch.zeros(1)))], dtype)
    assert scale.set(NUMEL, WEIGHT) == 1


def test_the_scale_changes_no_digit() -> None:
    assert torch.equal(gradient("float16", torch.float32), gradient("float32", torch.float32))
    assert torch.equal(gradient("float16", torch.float32, lowered=7), gradient("float32", torch.float32))


def test_an_overflow_lowers_the_scale_until_steps_have_passed() -> None:
    scale = LossScale([], "float16")
    first = scale.set(NUMEL, WEIGHT)
    assert 0.7 < first / (NUMEL / WEIGHT) < 1.5
    scale.record(overflowed=True)
    assert scale.set(NUMEL, WEIGHT) == first / 2**LOWERED_BY
    for _ in range(RAISED_AFTER):
        scale.record(overflowed=False)
    assert scale.set(NUMEL, WEIGHT) == first / 2 ** (LOWERED_BY - 1)
    for _ in range(LOWERED_BY * RAISED_AFTER):
        scale.record(overflowed=False)
    assert scale.set(NUMEL, WEIGHT) == first


def test_a_share_of_padding_alone_has_a_scale() -> None:
    assert LossScale([], "float16").set(4096, 0.0) == 4096


@pytest.mark.usefixtures("process_group")
def test_a_checkpoint_has_the_scale(pipeline_folder: Path, tmp_path: Path) -> None:
    model, learner = model_settings(pipeline_folder, dtype="float16", lora_rank=4), learner_settings()
    worker = start(model, rollout_settings(), learner)
    worker.loss_scale.record(overflowed=True)
    worker.loss_scale.record(overflowed=False)
    worker.save(str(tmp_path / "saved"))
    worker.saved(wait=True)
    again = start(model, rollout_settings(), learner)
    again.restore(str(tmp_path / "saved"))
    assert (again.loss_scale.lowered, again.loss_scale.steps) == (LOWERED_BY, 1)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_with_rounded_parameters_is_refused(
    pipeline_folder: Path, tmp_path: Path, dtype: str
) -> None:
    worker = start(model_settings(pipeline_folder, dtype=dtype), rollout_settings(), learner_settings())
    worker.save(str(tmp_path / "saved"))
    worker.saved(wait=True)
    counts = tmp_path / "saved" / "learner.json"
    counts.write_text(
        json.dumps({k: v for k, v in json.loads(counts.read_text()).items() if k != "loss_scale"})
    )
    if dtype == "float32":
        worker.restore(str(tmp_path / "saved"))
        return
    with pytest.raises(ValueError, match="trained in bfloat16 by an older version"):
        worker.restore(str(tmp_path / "saved"))
