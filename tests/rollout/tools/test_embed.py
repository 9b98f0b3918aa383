"""Prompts encoded beforehand: the same values, and samplers without text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.families.registry import load_policy
from rollout.settings import ModelSettings
from rollout.tools.embed import fill
from rollout.tools.tiny_families import TINY

TEXTS = ("a red circle", "two blue crosses above a green square")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", list(TINY))
def test_a_filled_folder_replaces_the_encoders_of_every_family(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    model = ModelSettings(path=str(tiny.save(tmp_path / name)), dtype="bfloat16", lora_rank=2)
    rollout = tiny.settings(embeddings=tmp_path / "embeddings")
    assert list(fill(model, rollout, TEXTS[:1], "cpu")) == list(TEXTS[:1])

    plain = load_policy(model, tiny.settings(), device="cpu", seed=0)
    policy = load_policy(model, rollout, device="cpu", seed=0)
    assert policy.embedder.encoders == {}
    assert policy.pipeline.text_encoder is None
    assert same(policy.encode(TEXTS[0]), plain.encode(TEXTS[0]))
    assert policy.pipeline.text_encoder is None  # nor for the empty prompt of guidance

    assert same(policy.encode(TEXTS[1]), plain.encode(TEXTS[1]))  # not filled in: they are loaded
    assert policy.embedder.encoders.keys() == plain.embedder.encoders.keys() != set()


@pytest.mark.parametrize(
    "change", [{"dtype": "float16"}, {"text_tokens": 32}, {"encoder": True}], ids=lambda c: next(iter(c))
)
def test_a_folder_of_something_else_is_not_trusted(change: dict[str, Any], tmp_path: Path) -> None:
    tiny = TINY["flux"]
    folder = tiny.save(tmp_path / "model")
    rollout = tiny.settings(embeddings=tmp_path / "embeddings")
    model = ModelSettings(path=str(folder), dtype="bfloat16", lora_rank=2)
    list(fill(model, rollout, TEXTS[:1], "cpu"))
    if change.pop("encoder", False):
        (weights,) = (folder / "text_encoder").glob("*.safetensors")
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
    tokens = change.pop("text_tokens", None)
    rollout = rollout.model_copy(update={"text_tokens": tokens} if tokens else {})
    policy = load_policy(model.model_copy(update=change), rollout, device="cpu", seed=0)
    assert policy.embedder.encoders
