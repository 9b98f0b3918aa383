"""The adapters by diffusers pipeline, and the interface of an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from rollout.named import imported
from rollout.text_files import read_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from rollout.settings import ModelSettings, RolloutSettings

FAMILIES: Final = {
    "StableDiffusion3Pipeline": "rollout.families.sd3:SD3",
    "FluxPipeline": "rollout.families.flux:Flux",
    "Flux2Pipeline": "rollout.families.flux2:Flux2",
    "Flux2KleinPipeline": "rollout.families.flux2:Flux2",
    "QwenImagePipeline": "rollout.families.qwen_image:QwenImage",
    "ZImagePipeline": "rollout.families.z_image:ZImage",
    "SanaPipeline": "rollout.families.sana:Sana",
    "WanPipeline": "rollout.families.wan:Wan",
}
"""Pipeline class in ``model_index.json`` -> adapter. A new family is one file and one line here.

A user's own is named by ``model.family``.
"""

Tensors = dict[str, "Tensor"]
Velocity = Callable[..., "Tensor"]


class ModelFolderError(ValueError):
    """A model path is not a pipeline that can be trained."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Noise levels (T + 1,) from 1 to 0 and the transformer's T timesteps, both float32."""

    sigmas: Tensor
    timesteps: Tensor

    def to(self, device: torch.device | str) -> Schedule:
        """Return the schedule on a device."""
        return Schedule(self.sigmas.to(device), self.timesteps.to(device))


class Policy(Protocol):
    """A model family's adapter, which encodes prompts, predicts velocities and decodes images."""

    transformer: nn.Module
    lora_targets: Sequence[str]

    @property
    def tokens(self) -> int:
        """Image tokens of one candidate, as the transformer sees it."""
        ...

    @staticmethod
    def arguments(rollout: RolloutSettings) -> dict[str, Any]:
        """Return the arguments of the diffusers pipeline for these settings' guidance and prompt length."""
        ...

    def schedule(self, steps: int) -> Schedule:
        """Compute the family's noise schedule for a number of steps."""
        ...

    def encode(self, text: str) -> Tensors:
        """Encode one prompt to named conditioning tensors, without a batch dimension."""
        ...

    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one image's latents at the configured size."""
        ...

    def velocity(self, model: Velocity, x: Tensor, timestep: Tensor, conditioning: Tensors) -> Tensor:
        """Compute the guided velocity (N, ...) in float32; ``model`` is the transformer or its engine."""
        ...

    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Decode clean latents to images (N, H, W, 3) uint8 and a mask (N,) of the finite ones."""
        ...


def family_of(path: str, family: str | None = None) -> str:
    """Return the adapter's "module:Class" for a pipeline's folder or its name on the hub.

    ``family`` is a user's own, which is imported only by `family_class`.

    Raises:
        ModelFolderError: if the folder is not a pipeline or its family is unknown.
    """
    index = Path(path) / "model_index.json"
    if not Path(path).is_dir():
        index = _hub_index(path)
    try:
        name = str(json.loads(read_text(index))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(
            f"model.path: {path} is not a diffusers pipeline ({index}: {error})"
        ) from error
    if family is not None:
        return family
    if name not in FAMILIES:
        raise ModelFolderError(
            f"model.path: {path} is a {name}; supported are {', '.join(FAMILIES)}, "
            "and any with an adapter of your own as model.family"
        )
    return FAMILIES[name]


def _hub_index(path: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(path, "model_index.json"))
    except (OSError, HFValidationError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelFolderError(
            f"model.path: {path} is neither a folder nor a reachable model: {reason}"
        ) from error


def family_class(path: str, family: str | None = None) -> Any:
    """Import the adapter's class for a pipeline; a user's own ``family`` is checked.

    Raises:
        ModelFolderError: naming the key, the value and what was expected.
    """
    name = family_of(path, family)
    try:
        found = imported(name)
    except ValueError as error:
        raise ModelFolderError(f"model.family: got {name!r}: {error}") from error
    return found if family is None else _checked(name, found)


def _checked(name: str, found: Any) -> Any:
    from rollout.families.diffusers_policy import DiffusersPolicy

    if not isinstance(found, type) or not issubclass(found, DiffusersPolicy):
        base = f"{DiffusersPolicy.__module__}.{DiffusersPolicy.__name__}"
        raise ModelFolderError(f"model.family: got {name!r}, expected a subclass of {base}")
    if lacking := sorted(found.__abstractmethods__):
        raise ModelFolderError(f"model.family: {name!r} lacks {', '.join(lacking)} of a DiffusersPolicy")
    return found


def load_policy(
    model: ModelSettings,
    rollout: RolloutSettings,
    *,
    device: str,
    seed: int,
    whole: bool = True,
    placed: bool = True,
) -> Any:
    """Load the adapter of a pipeline, with its LoRA layers; without ``whole`` only the transformer.

    Without ``placed`` the transformer stays in the CPU's memory.
    """
    made = family_class(model.path, model.family)
    return made(model, rollout, device=device, seed=seed, whole=whole, placed=placed)
