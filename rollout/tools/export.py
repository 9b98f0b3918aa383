"""Export of trained weights as folders that plain diffusers loads: a LoRA adapter, or a whole pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from rollout.families.registry import Tensors, family_class, load_policy
from rollout.families.transformer import stays_float32
from rollout.settings import ModelSettings, RolloutSettings
from rollout.weights import trainable


class ExportError(ValueError):
    """A file of weights cannot be read or does not fit the model."""


def write_lora(weights: Path, model: ModelSettings, rollout: RolloutSettings, folder: Path) -> None:
    """Write the adapter for diffusers' `load_lora_weights`: in float32, with rank, alpha and targets.

    ``weights`` holds every trained parameter by its name (`rollout.weights.trainable`).

    Raises:
        ExportError: if the weights are not this model's.
    """
    transformer = load_policy(model, rollout, device="cpu", seed=0, whole=False).transformer
    tensors = _read(weights, transformer)
    pipeline = getattr(diffusers, DiffusionPipeline.load_config(model.path)["_class_name"])
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, state_dict=tensors),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


def write_pipeline(weights: Path, model: ModelSettings, rollout: RolloutSettings, folder: Path) -> None:
    """Write a pipeline for diffusers' `from_pretrained`: the base's files and the trained transformer.

    An adapter is fused into the transformer in float32; the result is saved in the precision of the run.

    Raises:
        ExportError: if the weights are not this model's.
    """
    exact = model.model_copy(update={"dtype": "float32"})
    transformer = load_policy(exact, rollout, device="cpu", seed=0, whole=False).transformer
    _fill(transformer, _read(weights, transformer))
    if model.trains_adapter:
        transformer.fuse_lora()
        transformer.unload_lora()
    for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers()):
        if tensor.is_floating_point() and not stays_float32(transformer, name):
            tensor.data = tensor.data.to(getattr(torch, model.dtype))
    transformer.save_pretrained(folder / "transformer")
    _copy_others(model.path, folder)


def absent_components(path: str) -> tuple[str, ...]:
    """Return the components that a pipeline lacks and that must be passed to plain diffusers as None."""
    index = DiffusionPipeline.load_config(path)
    optional = getattr(diffusers, index["_class_name"])._optional_components
    return tuple(name for name, entry in index.items() if entry == [None, None] and name not in optional)


def call_arguments(path: str, rollout: RolloutSettings, family: str | None = None) -> dict[str, Any]:
    """Return the arguments with which plain diffusers samples a pipeline like a run's evaluations."""
    kind = family_class(path, family)
    arguments: dict[str, Any] = kind.arguments(kind.with_defaults(rollout))
    return {
        "width": rollout.width,
        "height": rollout.height,
        "num_inference_steps": rollout.eval_steps,
        **arguments,
    }


def _read(weights: Path, transformer: Any) -> Tensors:
    try:
        tensors: Tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{weights}: not a readable safetensors file: {error}") from error
    expected = {name: tuple(parameter.shape) for name, parameter in trainable(transformer)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name, _ in expected.items() ^ found.items())
    if wrong:
        name = wrong[0]
        raise ExportError(
            f"{weights}: {len(set(wrong))} parameters do not fit the model, first {name}: "
            f"shape {found.get(name)}, expected {expected.get(name)} (None: no such parameter)"
        )
    return tensors


@torch.no_grad()
def _fill(transformer: Any, tensors: Tensors) -> None:
    for name, parameter in trainable(transformer):
        parameter.copy_(tensors[name])


def _copy_others(path: str, folder: Path) -> None:
    """Copy everything but the transformer's weights from the base pipeline, byte for byte."""
    base = Path(path) if Path(path).is_dir() else Path(DiffusionPipeline.download(path))
    index = DiffusionPipeline.load_config(path)
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and name != "transformer":
            shutil.copytree(base / name, folder / name)
    # The base's configuration, since saving adds the base's path on this machine to the transformer's.
    for name in ("model_index.json", "transformer/config.json"):
        shutil.copy(base / name, folder / name)
