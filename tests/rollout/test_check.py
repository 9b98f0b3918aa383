"""Tests of the check before a run: it refuses what an actor would, for every family, without memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.check import Question, answer
from rollout.families.registry import load_policy
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.tiny_families import TINY
from tests.rollout.conftest import Folder


def ask(path: Path | str, rollout: RolloutSettings, *prompts: str, **model: Any) -> Any:
    elsewhere, together = model.pop("elsewhere", False), model.pop("sequence_parallel", 1)
    settings = ModelSettings(path=str(path), **model)
    return answer(
        Question(
            model=settings, rollout=rollout, prompts={"p.txt": prompts}, elsewhere=elsewhere,
            sequence_parallel=together,
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_a_configuration_that_runs_is_not_refused(name: str, folder: Folder) -> None:
    assert ask(folder(name), TINY[name].settings(), "a cat", lora_rank=4) == {"remarks": []}


@pytest.mark.parametrize("name", TINY)
def test_no_weight_is_read(name: str, folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(folder(name), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert ask(tmp_path / "bare", TINY[name].settings(), "a cat") == {"remarks": []}


def test_prompts_longer_than_clip_are_counted(folder: Folder) -> None:
    """Two prompts that differ at their end alone encode alike: exactly those are counted."""
    settings = TINY["sd3"].settings()
    texts = ["a photo of " + "a red circle " * 8 + end for end in ("and one", "and two")]
    policy = load_policy(ModelSettings(path=str(folder("sd3"))), settings, device="cpu", seed=0)
    assert torch.equal(*(policy.embed(text)["hidden"] for text in texts))
    (said,) = ask(folder("sd3"), settings, "a photo of a circle", *texts)["remarks"]
    assert said.startswith("p.txt: 2 of 3 prompts are cut at 14 tokens (CLIP), the longest has ")
    assert said.endswith("; the first: 2, 3")


def test_many_cut_prompts_are_named_by_the_first(folder: Folder) -> None:
    (said,) = ask(folder("wan"), TINY["wan"].settings(text_tokens=5), *["a long prompt"] * 30)["remarks"]
    assert said.startswith("p.txt: 30 of 30 prompts are cut at 5 tokens")
    assert "the first: 1, 2, 3, 4, 5;" in said


def test_sd3_needs_no_text(folder: Folder) -> None:
    assert ask(folder("sd3"), TINY["sd3"].settings(text_tokens=0), "a") == {"remarks": []}


@pytest.mark.parametrize("name", ["flux", "flux2_dev", "flux2_klein", "qwen_image", "wan", "wan_5b"])
def test_tokens_that_two_ranks_can_divide_are_not_refused(name: str, folder: Folder) -> None:
    assert ask(folder(name), TINY[name].settings(), "a cat", sequence_parallel=2) == {"remarks": []}


@pytest.mark.parametrize(
    ("name", "changes", "ranks", "why"),
    [
        ("sd3", {}, 2, "got 2, but diffusers cannot divide a SD3Transformer2DModel"),
        ("wan", {}, 4, "got 4, expected a divisor of the model's 2 attention heads"),
        ("wan", {"width": 48, "height": 16, "frames": 1}, 2, "the model's 3 image tokens"),
        ("flux", {"text_tokens": 47}, 2, "the model's 47 prompt tokens (rollout.text_tokens)"),
    ],
)
def test_tokens_that_cannot_be_divided_are_refused(
    name: str, changes: dict[str, Any], ranks: int, why: str, folder: Folder
) -> None:
    found = ask(folder(name), TINY[name].settings(**changes), "a cat", sequence_parallel=ranks)
    assert found["refused"].startswith("learner.sequence_parallel: got ")
    assert why in found["refused"]


def test_an_attention_that_cannot_be_divided_is_refused(folder: Folder) -> None:
    found = ask(folder("wan"), TINY["wan"].settings(), "a", attention="flex", sequence_parallel=2)
    assert found["refused"] == "learner.sequence_parallel: got 2, but not with model.attention = 'flex'"


def test_a_backend_of_other_machines_is_judged_by_its_name(folder: Folder) -> None:
    settings = TINY["flux"].settings()
    assert "flash-attn" in ask(folder("flux"), settings, attention="flash")["refused"]
    (said,) = ask(folder("flux"), settings, "a", attention="flash", elsewhere=True)["remarks"]
    assert said == "model.attention: not checked here is whether the nodes have what flash needs"
    refused = ask(folder("flux"), settings, attention="flesh", elsewhere=True)["refused"]
    assert refused.startswith("model.attention: got 'flesh', expected one of flash, ")


@pytest.mark.parametrize("lost", ["transformer/config.json", "scheduler", "vae"])
def test_a_folder_that_lacks_a_part_is_refused(lost: str, folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(folder("flux"), tmp_path / "part")
    path = tmp_path / "part" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = ask(tmp_path / "part", TINY["flux"].settings(), "a")["refused"]
    assert said.startswith(f"model.path: {tmp_path / 'part'}: ")
    assert "\n" not in said


def test_a_model_of_a_hub_out_of_reach_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rollout.families.registry.family_of", lambda path, family: "rollout.families.sd3:SD3"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (said,) = ask("nobody/has-this-model", TINY["sd3"].settings(), "a")["remarks"]
    assert said.startswith("model.path: nobody/has-this-model could not be checked: ")


def test_the_answer_is_all_that_is_printed(folder: Folder) -> None:
    question = {
        "model": {"path": str(folder("sd3"))}, "rollout": {"width": 33}, "prompts": {}, "elsewhere": False,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "rollout.check"],
        input=json.dumps(question), capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "expected multiples of 8" in json.loads(done.stdout)["refused"]
