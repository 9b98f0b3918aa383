"""Tests of the families: trainable folders, the messages about others, and needs of single families."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from rollout.families.registry import FAMILIES, ModelFolderError, family_class, family_of, load_policy
from rollout.noise import candidate_noises
from rollout.sampler import denoise
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.export import call_arguments
from rollout.tools.tiny_families import TINY
from tests.support.start_noise import starts_from


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_saved_pipeline_names_its_family(pipeline_folder: Path) -> None:
    assert family_of(str(pipeline_folder)) == FAMILIES["StableDiffusion3Pipeline"]


@pytest.mark.parametrize(
    "index",
    [None, "{", "{}", "[]", '"StableDiffusion3Pipeline"'],
    ids=["missing", "broken", "empty", "list", "string"],
)
def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ModelFolderError) as caught:
        family_of(str(tmp_path))
    assert f"model.path: {tmp_path} is not a diffusers pipeline" in str(caught.value)
    assert "model_index.json" in str(caught.value)


@pytest.mark.parametrize("name", ['"LuminaPipeline"', '["my_pipeline", "LuminaPipeline"]'])
def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": {name}}}')
    with pytest.raises(ModelFolderError, match=r"LuminaPipeline.*supported are StableDiffusion3Pipeline"):
        family_of(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("SD3", r"model\.family: got 'SD3': 'SD3' is not of the form module:attribute"),
        ("nowhere:SD3", r"model\.family: got 'nowhere:SD3': cannot import 'nowhere'"),
        ("rollout.families.sd3:SD4", r"has no 'SD4'"),
        ("rollout.families.registry:Schedule", r"expected a subclass of .*DiffusersPolicy"),
        ("rollout.families.registry:family_of", r"expected a subclass of .*DiffusersPolicy"),
        ("rollout.families.diffusers_policy:DiffusersPolicy", r"lacks cell, embed, latent_shape, predict"),
    ],
)
def test_a_family_of_ones_own_that_is_none_is_refused(
    pipeline_folder: Path, family: str, message: str
) -> None:
    with pytest.raises(ModelFolderError, match=message):
        family_class(str(pipeline_folder), family)


def test_a_family_may_be_named_for_a_pipeline_that_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "LuminaPipeline"}')
    assert family_class(str(tmp_path), "rollout.families.sd3:SD3").__name__ == "SD3"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", ["no/such/folder/anywhere", "nobody/has-this-model", "bad name!"])
def test_neither_a_folder_nor_a_model(path: str) -> None:
    with pytest.raises(ModelFolderError) as caught:
        family_of(path)
    assert str(caught.value).startswith(f"model.path: {path} is neither a folder nor a reachable model: ")


def swap_scheduler(folder: Path, scheduler: SchedulerMixin) -> None:
    """Change only the schedule of a saved pipeline."""
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")


def test_sd3_may_shift_by_the_images_size(tmp_path: Path) -> None:
    folder = TINY["sd3"].save(tmp_path / "sd3")
    swap_scheduler(folder, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=9.0))
    rollout = TINY["sd3"].settings(guidance=1.0)
    policy = load_policy(ModelSettings(path=str(folder)), rollout, device="cpu", seed=0)
    arguments = call_arguments(str(folder), rollout)
    policy.pipeline("a cat", output_type="latent", **arguments)
    expected = policy.pipeline.scheduler.sigmas.clone()
    found = policy.schedule(rollout.eval_steps).sigmas
    assert torch.equal(found, expected)
    smaller = load_policy(
        ModelSettings(path=str(folder)), TINY["sd3"].settings(width=16), device="cpu", seed=0, whole=False
    )
    assert not torch.equal(smaller.schedule(rollout.eval_steps).sigmas, found)


@pytest.mark.parametrize("name", list(TINY))
def test_prompts_have_the_familys_own_length_by_default(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    folder = tiny.save(tmp_path / name)
    policy = load_policy(
        ModelSettings(path=str(folder)), tiny.settings(text_tokens=None), device="cpu", seed=0, whole=False
    )
    own = {"FluxPipeline": 512, "Flux2Pipeline": 512, "Flux2KleinPipeline": 512, "WanPipeline": 512}
    expected = {**own, "SanaPipeline": 300}.get(policy.index["_class_name"], 128)
    assert policy.text_tokens == expected
    arguments = call_arguments(str(folder), tiny.settings(text_tokens=None))
    assert arguments["max_sequence_length"] == expected
    policy.check_text_tokens()


def test_z_image_reads_the_lengths_of_a_batch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = TINY["z_image"].settings(guidance=1.0)
    folder = TINY["z_image"].save(tmp_path / "z")
    policy = load_policy(ModelSettings(path=str(folder)), rollout, device="cpu", seed=0)
    encoded = [policy.encode(text) for text in ("a cat", "two blue crosses above a green square")]
    conditioning = {name: torch.stack([one[name] for one in encoded]) for name in encoded[0]}
    reads: list[int] = []
    summed = torch.Tensor.sum
    mask = id(conditioning["mask"])

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        reads.append(1) if id(tensor) == mask else None
        return summed(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "sum", counted)
    denoise(policy, rollout, conditioning, candidate_noises(0, 0, 0, 2), policy.schedule(4), range(0))
    assert len(reads) == 1
    del conditioning
    gc.collect()
    assert len(policy.lengths) == 0


SOLVERS = {
    "sana": DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", solver_order=1
    ),
    "wan": UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction", solver_order=1,
        disable_corrector=[0, 1, 2],
    ),
}  # fmt: skip
"""As these families' pipelines come, but of first order: so they are the Euler steps that we take."""


@pytest.mark.parametrize("name", SOLVERS)
def test_a_multistep_solvers_schedule_starts_from_pure_noise(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    folder = tiny.save(tmp_path / name)
    swap_scheduler(folder, SOLVERS[name])
    rollout = tiny.settings(guidance=1.0)
    policy = load_policy(ModelSettings(path=str(folder)), rollout, device="cpu", seed=0)
    found = policy.schedule(rollout.eval_steps)
    policy.scheduler.set_timesteps(rollout.eval_steps)
    assert found.sigmas[0] == 1 > policy.scheduler.sigmas[0]
    assert torch.equal(found.sigmas[1:], policy.scheduler.sigmas[1:])
    assert torch.equal(found.timesteps, policy.scheduler.timesteps.float())

    noises = candidate_noises(0, 0, 0, 1)
    conditioning = {key: value[None] for key, value in policy.encode("a cat").items()}
    clean = denoise(policy, rollout, conditioning, noises, found, range(0)).clean
    with starts_from(policy.pipeline, noises):
        arguments = call_arguments(str(folder), rollout)
        expected = policy.pipeline(prompt="a cat", output_type="latent", **arguments)[0]
    assert (clean - expected).abs().max() < 2e-3  # the solvers leave 3e-4 of the noise level out


def test_a_schedule_that_is_no_flow_is_refused(tmp_path: Path) -> None:
    folder = TINY["sana"].save(tmp_path / "sana")
    swap_scheduler(folder, DPMSolverMultistepScheduler())
    model = ModelSettings(path=str(folder))
    policy = load_policy(model, TINY["sana"].settings(), device="cpu", seed=0, whole=False)
    with pytest.raises(ValueError, match=r"DPMSolver.*first noise level is .*, expected 1 \(flow matching\)"):
        policy.schedule(4)


def load(folder: Path, rollout: RolloutSettings) -> Any:
    return load_policy(ModelSettings(path=str(folder)), rollout, device="cpu", seed=0, whole=False)


def test_lengths_of_videos_are_checked(tmp_path: Path) -> None:
    wan, flux = TINY["wan"].save(tmp_path / "wan"), TINY["flux"].save(tmp_path / "flux")
    with pytest.raises(ValueError, match=r"rollout.frames: got 8, expected 1 more than a multiple of 4"):
        load(wan, TINY["wan"].settings(frames=8))
    with pytest.raises(ValueError, match=r"rollout.frames: got 5, but a FluxPipeline makes images"):
        load(flux, TINY["flux"].settings(frames=5))


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_rewards_see_the_frame_in_the_middle(tmp_path: Path, frames: int) -> None:
    rollout = TINY["wan"].settings(frames=frames)
    folder = TINY["wan"].save(tmp_path / "wan")
    policy = load_policy(ModelSettings(path=str(folder)), rollout, device="cpu", seed=0)
    latents = torch.randn(2, *policy.latent_shape())
    config = policy.pipeline.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        video = policy.pipeline.vae.decode(latents * std + mean).sample
        found = policy.pixels(latents)
    assert video.shape == (2, 3, frames, rollout.height, rollout.width)
    assert torch.allclose(found, video[:, :, frames // 2], atol=1e-5)


def test_two_transformers_are_refused(tmp_path: Path) -> None:
    folder = TINY["wan"].save(tmp_path / "wan")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.875}))
    with pytest.raises(ModelFolderError, match=r"pipeline has two transformers \(boundary_ratio 0.875\)"):
        load(folder, TINY["wan"].settings())
