"""Errors that actors would raise, raised by ``--dry-run`` for every family with status 2 and one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import save_file

from cluster import service
from cluster.config.errors import PoolError
from cluster.train import main
from rollout.tools.tiny_families import TINY

Capture = pytest.CaptureFixture[str]
DRY = ["shapes", "--dry-run", "--prompts.train", "rollout/tiny/prompts/shapes-train.jsonl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")

    def save(name: str) -> Path:
        return root / name if (root / name).exists() else TINY[name].save(root / name)

    return save


@pytest.fixture
def enough_memory(set_free_memory: Any) -> None:
    """Set enough free memory for all runs."""
    set_free_memory(64)


def command(name: str, path: Path, *flags: str) -> list[str]:
    """Run a dry run of a family with fitting settings, overridden by wrong ones."""
    rollout = TINY[name].settings(
        text_tokens=0 if name == "sd3" else max(TINY[name].settings().text_tokens, 200)
    )
    fitting = {"width", "height", "frames", "guidance", "text_tokens", "eval_steps"}
    given = [part for key in sorted(fitting) for part in (f"--rollout.{key}", str(getattr(rollout, key)))]
    return [*DRY, "--model.path", str(path), *given, *flags]


@pytest.mark.usefixtures("enough_memory")
@pytest.mark.parametrize("name", TINY)
def test_settings_that_fit_a_family_pass(name: str, folder: Callable[[str], Path], capsys: Capture) -> None:
    path = folder(name)
    capsys.readouterr()  # what saving it has printed
    status = main(command(name, path))
    assert (status, capsys.readouterr().err) == (0, "")


SIZE = "rollout.width and rollout.height: got "
IMPOSSIBLE = [
    ("sd3", "--rollout.width 33", SIZE + "33 x 16, expected multiples of 8 for a StableDiffusion3Pipeline"),
    ("sd3", "--rollout.height 8000", SIZE + "24 x 8000, expected at most "),
    ("flux", "--rollout.height 17", SIZE + "24 x 17, expected multiples of 4 for a FluxPipeline"),
    ("flux2_dev", "--rollout.width 26", SIZE + "26 x 16, expected multiples of 4 for a Flux2Pipeline"),
    ("flux2_klein", "--rollout.width 2", SIZE + "2 x 16, expected multiples of 4 for a Flux2KleinPipeline"),
    ("qwen_image", "--rollout.width 20", SIZE + "20 x 16, expected multiples of 8 for a QwenImagePipeline"),
    ("z_image", "--rollout.width 6", SIZE + "6 x 16, expected multiples of 4 for a ZImagePipeline"),
    ("z_image", "--rollout.width 132", SIZE + "132 x 16, expected at most 128 on a side"),
    ("sana", "--rollout.height 33", SIZE + "64 x 33, expected multiples of "),
    ("wan", "--rollout.height 24", SIZE + "48 x 24, expected multiples of 16 for a WanPipeline"),
    ("wan_5b", "--rollout.width 528", SIZE + "528 x 32, expected at most 512 on a side"),
    ("wan", "--rollout.frames 8", "rollout.frames: got 8, expected 1 more than a multiple of 4"),
    ("wan", "--rollout.frames 129", "rollout.frames: got 129, expected at most 125"),
    ("sana", "--rollout.frames 5", "rollout.frames: got 5, but a SanaPipeline makes images"),
    ("qwen_image", "--rollout.eval_steps 1", "rollout.eval_steps: got 1, but the model's schedule cannot: "),
    ("flux", "--rollout.eval_steps 0",
     "rollout.eval_steps: Input should be greater than or equal to 1, got '0'"),
    ("flux", "--rollout.text_tokens 0",
     "rollout.text_tokens: got 0, expected at least 2: 1 tokens are the same"),
    ("flux", "--rollout.text_tokens 513",
     "rollout.text_tokens: got 513, expected at most 512 for a FluxPipeline"),
    ("flux2_dev", "--rollout.text_tokens 40", "rollout.text_tokens: got 40, expected at least "),
    ("flux2_klein", "--rollout.text_tokens 9", "rollout.text_tokens: got 9, expected at least "),
    ("qwen_image", "--rollout.text_tokens 0", "rollout.text_tokens: got 0, expected at least "),
    ("qwen_image", "--rollout.text_tokens 2000", "got 2000, expected at most 1024 for a QwenImagePipeline"),
    ("z_image", "--rollout.text_tokens 16", "rollout.text_tokens: got 16, expected at least "),
    ("sana", "--rollout.text_tokens 0", "rollout.text_tokens: got 0, expected at least "),
    ("sana", "--rollout.text_tokens 301",
     "rollout.text_tokens: got 301, expected at most 300 for a SanaPipeline"),
    ("wan_5b", "--rollout.text_tokens 1",
     "rollout.text_tokens: got 1, expected at least 2: 1 tokens are the same"),
    ("sana", "--model.lora_rank 4 --model.lora_targets=attn.q",
     "model.lora_targets: a SanaTransformer2DModel has no"),
    ("wan", "--model.lora_rank 4 --model.lora_targets=attn1",
     "model.lora_targets: Target module WanAttention"),
    ("z_image", "--model.lora_path {none}",
     "model.lora_path: {none} is neither a file or folder nor a reachable"),
    ("flux", "--model.lora_path {part}", "model.lora_path: {part} does not fit the model: "),
    ("flux2_klein", "--model.lora_path {text}", "model.lora_path: {text}: not a readable safetensors file: "),
    ("qwen_image", "--model.attention flesh",
     "model.attention: `backend='flesh'` must be one of the following: "),
    ("flux", "--model.attention flash", "model.attention: Flash Attention backend 'flash' is not usable"),
    ("sd3", "--model.attention native",
     "model.attention: a SD3Transformer2DModel does not know diffusers' switch"),
    ("wan", "--rollout.embeddings {text}",
     "rollout.embeddings: got {text}, expected a folder, but {text} is a file"),
    ("sd3", "--rollout.embeddings {text}/in/it",
     "rollout.embeddings: got {text}/in/it, expected a folder, but {text}"),
    ("flux", "--rollout.guidance inf", "rollout.guidance: Input should be a finite number, got 'inf'"),
    ("sana", "--learner.learning_rate nan", "learner.learning_rate: Input should be"),
    ("wan", "--learner.betas [0.9,Infinity]", "learner.betas.1: Input should be a finite number, got inf"),
    ("flux", "--learner.max_grad_norm inf",
     "learner.max_grad_norm: Input should be a finite number, got 'inf'"),
    ("z_image", "--cluster.deadline inf", "cluster.deadline: Input should be a finite number, got 'inf'"),
    ("sd3", "--learner.deepspeed {json}",
     "learner.deepspeed: {json}.comms.x: expected a finite number, got nan"),
    ("flux", '--rewards [{"name":"jpeg","weight":Infinity}]',
     "rewards.0.weight: Input should be a finite number"),
    ("sd3", '--rewards [{"name":"judge","options":{"timeout":NaN}}]',
     "timeout: expected a finite number, got nan"),
    ("wan", '--rewards [{"name":"jpeg","options":{"prefr":"large"}}]',
     "rewards: reward 'jpeg' has no option 'prefr'; did you mean prefer? (it takes prefer)"),
    ("sana", '--rewards [{"name":"jpeg","options":{"prefer":"huge"}}]',
     "rewards: reward 'jpeg': option prefer: Input should be 'small' or 'large', got 'huge'"),
    ("sd3", '--rewards [{"name":"remote"}]', "rewards: reward 'remote' needs the option url"),
    ("flux", '--eval_rewards [{"name":"other","scorer":"shapes","options":{"size":3}}]',
     "rewards: reward 'other' has no option 'size' (it takes none)"),
]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Write the adapters of the cases: missing, of another format, incomplete, and not finite."""
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("none", "text", "part")}
    paths["text"].write_text("no tensors")
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{name}.lora_A.weight": torch.zeros(4, 32)}, paths["part"])
    paths["json"] = tmp_path / "ds.json"
    paths["json"].write_text('{"comms": {"x": NaN}}')
    return paths


@pytest.mark.usefixtures("enough_memory")
@pytest.mark.parametrize(
    ("name", "flags", "said"), IMPOSSIBLE, ids=[f"{n} {flags}" for n, flags, _ in IMPOSSIBLE]
)
def test_an_impossible_value_is_refused_by_a_dry_run(
    name: str, flags: str, said: str, folder: Callable[[str], Path], files: dict[str, Path], capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = folder(name)
    capsys.readouterr()
    for key, file in files.items():
        flags, said = flags.replace(f"{{{key}}}", str(file)), said.replace(f"{{{key}}}", str(file))
    status = main(command(name, path, *flags.split(" ")))
    shown = capsys.readouterr()
    error = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(error) == 1
    assert said in error[0]
    assert "Traceback" not in shown.err + shown.out
    assert "plan" not in shown.out
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("flags", "said", "asked"),
    [
        (["--rollout.width", "33"], "expected multiples of 8", 1),
        (["--model.lora_rank", "4", "--model.lora_targets", "nonesuch"], "has no module 'nonesuch'", 1),
        (["--rollout.guidance", "inf"], "finite number", 0),
    ],
)
@pytest.mark.usefixtures("enough_memory", "judged_apart")
def test_a_refusal_loads_the_model_s_libraries_once_at_most(
    flags: list[str], said: str, asked: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has them is nearly all that a refusal costs; a value that needs no model starts none."""
    started: list[Any] = []
    run = subprocess.run

    def counted(command: Any, **options: Any) -> Any:
        started.append(command)
        return run(command, **options)

    monkeypatch.setattr("cluster.config.model_check.subprocess.run", counted)
    assert main([*DRY, *flags]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert said in shown.err
    assert not shown.out
    assert len(started) == asked


@pytest.mark.usefixtures("enough_memory", "judged_apart")
def test_a_check_that_dies_is_no_consent(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert main([*DRY, "--seed", "7"]) == 2
    assert (
        "error: model: its check ended with status 1 and without a result: no message"
        in capsys.readouterr().err
    )


@pytest.mark.usefixtures("enough_memory")
def test_cut_prompts_are_told_once_and_do_not_stop_a_run(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = Path("rollout/tiny/prompts/shapes-train.jsonl").read_text().splitlines()[:3]
    long = json.loads(lines[1])
    lines[1] = json.dumps({**long, "prompt": long["prompt"] + " and" * 20})
    path.write_text("\n".join(lines))
    assert main([*DRY, "--prompts.train", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"{path}: 1 of 3 prompts are cut at 14 tokens (CLIP), the longest has ") == 1
    assert "; the first: 2\n" in shown


@pytest.mark.usefixtures("enough_memory")
def test_what_a_start_says_is_an_event_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(_: Any) -> None:
        raise PoolError("far enough")

    monkeypatch.setattr(service, "connect", fail)
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of a circle" + " and a circle" * 9)
    flags = [
        "--prompts.train",
        str(path),
        "--rewards",
        '[{"name":"jpeg"}]',
        "--folder",
        str(tmp_path / "run"),
    ]
    assert main(["shapes", *flags]) == 1
    said = f"{path}: 1 of 1 prompts are cut at 14 tokens (CLIP), the longest has 34; the first: 1"
    assert said in capsys.readouterr().out.splitlines()
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [event["remark"] for event in events if event["event"] == "preflight"] == [said]


@pytest.mark.usefixtures("enough_memory")
def test_a_run_that_is_stopped_before_it_did_anything_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(service, "connect", stop)
    folder = tmp_path / "run"
    assert main([*DRY[:1], *DRY[2:], "--folder", str(folder)]) == 130
    assert "stopped" in capsys.readouterr().out
    assert not folder.exists()
