"""Exports drawn by plain diffusers, in a process that has none of our code, against the run's own images."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rollout.noise import held_out_latents
from rollout.records import Noise, Prompt
from rollout.sampler import denoise, started
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.export import ExportError, absent_components, write_lora, write_pipeline
from rollout.worker import RolloutWorker

TEXT, NOISE, STEPS, GUIDANCE = "a photo of two red circles", Noise(initial=11, path=0), 5, 2.5
RANK, ALPHA = 4, 10  # alpha/rank is neither 1 nor 2, so a lost alpha shows
ROLLOUT = RolloutSettings(
    width=32, height=32, steps=4, eval_steps=STEPS, guidance=GUIDANCE, text_tokens=0, gpus=0
)
LORA = {"lora_rank": RANK, "lora_alpha": ALPHA}

PLAIN = """
import json, sys
import numpy as np, torch
from diffusers import StableDiffusion3Pipeline
settings, absent, jobs = json.loads(sys.argv[1])
for base, lora, out in jobs:
    pipe = StableDiffusion3Pipeline.from_pretrained(base, dtype=torch.float32, **dict.fromkeys(absent))
    if lora:
        pipe.load_lora_weights(lora)
    latents = torch.from_numpy(np.load("start.npy"))
    latent, image = (pipe(latents=latents, output_type=kind, **settings).images for kind in ("latent", "np"))
    np.savez(out, latent=latent.numpy(), image=image)
assert not {"rollout", "learner", "cluster"} & set(sys.modules)
"""
CALL = {
    "prompt": TEXT, "width": 32, "height": 32, "guidance_scale": GUIDANCE, "num_inference_steps": STEPS,
    "max_sequence_length": 0,
}  # fmt: skip


@dataclass
class Case:
    """Weights as a checkpoint holds them, and what the run's sampler draws with them."""

    model: ModelSettings
    weights: Path
    latents: np.ndarray
    image: np.ndarray


def make_case(base: Path, folder: Path, **model: Any) -> Case:
    settings = ModelSettings(path=str(base), **model)
    worker = RolloutWorker(settings, ROLLOUT, seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in worker.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    folder.mkdir()
    weights = folder / "average.safetensors"
    tensors = {name: p.detach().float() for name, p in worker.parameters}
    save_file(tensors, weights)
    images = worker.evaluate([Prompt(index=0, text=TEXT)], [NOISE])[1]
    conditioning = {name: value[None] for name, value in worker.policy.encode(TEXT).items()}
    schedule = worker.policy.schedule(STEPS)
    begun = started(held_out_latents([NOISE], worker.policy.latent_shape()))
    clean = denoise(worker.policy, ROLLOUT, conditioning, [NOISE], schedule, range(0), begun=begun).clean
    return Case(settings, weights, clean.numpy(), images)


@pytest.fixture(scope="module")
def lora(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(pipeline_folder, tmp_path_factory.mktemp("lora") / "case", **LORA)


@pytest.fixture(scope="module")
def full(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(pipeline_folder, tmp_path_factory.mktemp("full") / "case")


def test_plain_diffusers_draws_the_evaluation_image(
    pipeline_folder: Path, lora: Case, full: Case, tmp_path: Path
) -> None:
    write_lora(lora.weights, lora.model, ROLLOUT, tmp_path / "lora")
    write_pipeline(lora.weights, lora.model, ROLLOUT, tmp_path / "fused")
    write_pipeline(full.weights, full.model, ROLLOUT, tmp_path / "full")
    jobs = {
        "base": (str(pipeline_folder), None),
        "lora": (str(pipeline_folder), str(tmp_path / "lora")),
        "fused": (str(tmp_path / "fused"), None),
        "full": (str(tmp_path / "full"), None),
    }
    shape = lora.latents.shape[1:]
    np.save(tmp_path / "start.npy", held_out_latents([NOISE], shape).numpy())
    listed = [(*job, f"{name}.npz") for name, job in jobs.items()]
    arguments = json.dumps([CALL, absent_components(str(pipeline_folder)), listed])
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {name: np.load(tmp_path / f"{name}.npz") for name in jobs}
    for name, case in (("lora", lora), ("fused", lora), ("full", full)):
        assert np.abs(found[name]["latent"] - case.latents).max() < 1e-4
        # The run keeps bytes: a float image may differ from them by the rounding, and by 1e-4.
        assert np.abs(255 * found[name]["image"] - case.image).max() <= 0.5 + 255e-4
        assert np.abs(found[name]["latent"] - found["base"]["latent"]).max() > 0.1


def test_a_lora_file_says_its_rank_and_alpha(lora: Case, tmp_path: Path) -> None:
    write_lora(lora.weights, lora.model, ROLLOUT, tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (RANK, ALPHA)
    tensors = load_file(path)
    assert all(name.startswith("transformer.transformer_blocks.") for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == len(load_file(lora.weights))


@pytest.mark.parametrize("change", [{}, LORA])
def test_a_pipeline_keeps_the_other_components_and_the_precision_of_the_run(
    pipeline_folder: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    case = make_case(pipeline_folder, tmp_path / "case", dtype="bfloat16", **change)
    write_pipeline(case.weights, case.model, ROLLOUT, tmp_path / "out")
    name = "transformer/diffusion_pytorch_model.safetensors"
    written, base, trained = (
        load_file(path) for path in (tmp_path / "out" / name, pipeline_folder / name, case.weights)
    )
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert written.keys() == base.keys()
    if not change:
        values = {**base, **trained}  # a buffer is not trained
        assert all(torch.equal(tensor, values[key].bfloat16()) for key, tensor in written.items())
    others = [path.relative_to(pipeline_folder) for path in pipeline_folder.rglob("*") if path.is_file()]
    for path in others:
        if path != Path(name):
            assert (tmp_path / "out" / path).read_bytes() == (pipeline_folder / path).read_bytes()


def test_missing_components_are_named(pipeline_folder: Path) -> None:
    assert absent_components(str(pipeline_folder)) == ("text_encoder_3", "tokenizer_3")


@pytest.mark.parametrize("what", [write_lora, write_pipeline])
@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("transformer_blocks.0.attn.to_q.lora_A.default.weight", None, "None, expected (4, 96)"),
        (
            "transformer_blocks.0.attn.to_q.lora_A.default.weight",
            (8, 96),
            "(8, 96), expected (4, 96)",
        ),
        ("transformer_blocks.9.attn.to_q.lora_A.default.weight", (4, 96), "(4, 96), expected None"),
    ],
)
def test_weights_of_another_model_are_refused(
    lora: Case, tmp_path: Path, what: Any, name: str, shape: tuple[int, ...] | None, said: str
) -> None:
    tensors = load_file(lora.weights)
    tensors.pop(name, None)
    if shape:
        tensors[name] = torch.zeros(shape)
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    with pytest.raises(ExportError, match="1 parameters do not fit") as caught:
        what(path, lora.model, ROLLOUT, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert f"{name}: shape {said}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_broken_file_is_refused(lora: Case, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(lora.weights.read_bytes()[:100])
    with pytest.raises(ExportError, match=r"weights\.safetensors: not a readable safetensors file"):
        write_lora(path, lora.model, ROLLOUT, tmp_path / "out")
