"""The settings of the model and the sampler; light enough for the driver to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rollout.retired_keys import Retired, with_moved, without_retired

Dtype = Literal["float32", "float16", "bfloat16"]
SolverName = Literal["euler", "dpm2", "unipc"]
"""The solvers of `rollout.solvers`."""


class Settings(BaseModel):
    """Base of every settings section: frozen, and unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    retired: ClassVar[Mapping[str, Retired]] = {}
    moved: ClassVar[Mapping[str, str]] = {}
    """Keys of older versions, with their new names."""

    @model_validator(mode="before")
    @classmethod
    def _today(cls, section: Any) -> Any:
        return without_retired(with_moved(section, cls.moved), cls.retired)


CPS_WINDOW: Final = 3
"""Steps of the window that the public implementations train with coefficient-preserving sampling."""


class ModelSettings(Settings):
    """The pipeline to train, and the part of it that is trained."""

    path: str = Field(description="diffusers pipeline: a folder, or a hub name")
    family: str | None = Field(
        None, description="module:Class of your own adapter; default: the one for the pipeline's class"
    )
    dtype: Dtype = Field(
        "float32", description="compute precision of the transformer; what is trained stays in float32"
    )
    lora_rank: int = Field(0, ge=0, description="rank of the LoRA adapter; 0 trains every parameter")
    lora_alpha: int = Field(64, gt=0, description="scale of the LoRA adapter")
    lora_targets: tuple[str, ...] = Field((), description="modules LoRA adapts; empty: the family's own")
    lora_path: str | None = Field(
        None, description="start from this adapter (diffusers format), with its own rank and targets"
    )
    attention: str | None = Field(
        None, description="attention backend of diffusers, such as flash; default: torch's own choice"
    )
    compile: bool = Field(
        False,
        description="compile the transformer's blocks: slow first calls, then faster ones; "
        "in half precision sampler and learner then round differently",
    )

    @property
    def trains_adapter(self) -> bool:
        """True if a LoRA adapter is trained instead of the model's own parameters."""
        return self.lora_rank > 0 or self.lora_path is not None

    @property
    def autocasts(self) -> bool:
        """True if all parameters are trained, in float32, and rounded for every pass by autocast."""
        return self.dtype != "float32" and not self.trains_adapter

    @model_validator(mode="after")
    def _one_adapter(self) -> ModelSettings:
        if self.lora_path is not None and self.lora_rank:
            raise ValueError(f"lora_path has its own rank; leave lora_rank ({self.lora_rank}) out")
        return self


class RolloutSettings(Settings):
    """Sampling of the candidates of every prompt."""

    retired: ClassVar[Mapping[str, Retired]] = {
        "branches": Retired(default=1, last="0.1.0", why="the study found independent noise better"),
        "antithetic": Retired(default=False, last="0.1.0", why="the study found independent noise better"),
    }

    moved: ClassVar[Mapping[str, str]] = {"preview_steps": "draft_steps"}

    width: int = Field(512, gt=0, description="image width in pixels")
    height: int = Field(512, gt=0, description="image height in pixels")
    frames: int = Field(1, ge=1, description="frames of a video (Wan); rewards see the one in the middle")
    steps: int = Field(10, ge=2, description="denoising steps when sampling candidates")
    eval_steps: int = Field(40, ge=1, description="denoising steps of the ODE when evaluating")
    guidance: float = Field(
        4.5,
        ge=1,
        description="guidance scale: classifier-free (1 turns it off), or that of a distilled model",
    )
    text_tokens: int | None = Field(
        None,
        ge=0,
        description="tokens of a prompt; longer prompts are truncated (SD3: for T5 alone); default: the "
        "family's own, which rollout/README.md lists",
    )
    dynamics: Literal["sde", "cps", "ode"] = Field(
        "sde",
        description="stochastic steps: Flow-GRPO's SDE, or coefficients-preserving sampling; ode has none, "
        "so that the initial noise alone decides, for objectives that need no steps (nft, awm, dpo)",
    )
    solver: SolverName = Field(
        "euler",
        description="solver of candidates with dynamics = ode, and of their drafts; dpm2 is DPM-Solver++ of "
        "second order, and dpm2 and unipc need fewer steps",
    )
    eval_solver: SolverName | None = Field(
        None, description="solver of evaluations; default: as rollout.solver"
    )
    density: Literal["gaussian", "unscaled"] | None = Field(
        None,
        description="log-density of a stochastic step; unscaled leaves 1 / (2 std^2) out, as published for "
        "cps, with a clip of 1e-5; default: unscaled with cps, else gaussian",
    )
    noise_level: float = Field(0.7, gt=0, le=1.5, description="noise level a of the stochastic steps")
    window_start: int = Field(0, ge=0, description="first step that may be stochastic and trained")
    window_stop: int | None = Field(
        None, description="one past the last such step; default: steps - 1, with cps steps / 2"
    )
    window_size: int | None = Field(
        None,
        ge=1,
        description="consecutive steps trained per group, drawn from the window; default: all of it, with "
        "cps and no window_stop at most 3",
    )
    draft: Literal["path", "ode"] | None = Field(
        None,
        description="kind of a draft: the clean image predicted after a part of the candidate's own path, "
        "which is then continued, or an image by a short ODE of the same noise, which is then drawn in full; "
        "default: path, but ode for candidates of a solver other than euler, which cannot continue",
    )
    draft_steps: int | None = Field(
        None,
        ge=1,
        description="denoising steps before a draft is scored; default: five sixths of the steps, or of an "
        "ODE's own path two thirds",
    )
    storage: Literal["float16", "bfloat16"] = Field("float16", description="precision of stored latents")
    batch: int = Field(16, ge=1, description="images per forward pass, of several groups if one has fewer")
    decode: Literal["whole", "sliced", "tiled"] = Field(
        "whole",
        description="sliced decodes one image at a time; tiled decodes it in tiles with blended seams",
    )
    offload_text: bool = Field(
        False,
        description="keep text encoders in CPU memory, and on the GPU only while they encode a new prompt",
    )
    embeddings: Path | None = Field(
        None, description="folder in which encoded prompts are cached, so that none is encoded twice"
    )
    workers: int = Field(1, ge=1, description="rollout actors")
    min_workers: int | None = Field(
        None, ge=1, description="rollout actors needed to start training; others join later; default: all"
    )
    gpus: float = Field(1, ge=0, description="GPUs per rollout actor; 0 samples on the CPU")
    threads: int = Field(1, ge=1, description="CPU threads per rollout actor")

    @property
    def window_range(self) -> tuple[int, int]:
        """The range [start, stop) of steps for the trained window."""
        if self.dynamics == "ode":
            return 0, 0
        stop = max(self.window_start + 1, self.steps // 2) if self.dynamics == "cps" else self.steps - 1
        return self.window_start, stop if self.window_stop is None else self.window_stop

    @property
    def trained_steps(self) -> int:
        """The number of steps of each trajectory that are stochastic, stored and trained."""
        start, stop = self.window_range
        if self.window_size is None and self.window_stop is None and self.dynamics == "cps":
            return min(CPS_WINDOW, stop - start)
        return self.window_size or stop - start

    @property
    def log_density(self) -> Literal["gaussian", "unscaled"]:
        """The log-density of a stochastic step."""
        return self.density or ("unscaled" if self.dynamics == "cps" else "gaussian")

    @property
    def draft_kind(self) -> Literal["path", "ode"]:
        """The kind of a draft."""
        return self.draft or ("path" if self.dynamics != "ode" or self.solver == "euler" else "ode")

    @property
    def drafted_steps(self) -> int:
        """The denoising steps before a draft is scored.

        By default as few as keep 85% of the contrast on all bundled tasks: RESULTS.md, drafts. A short ODE
        that is thrown away never does.
        """
        continued = self.dynamics == "ode" and self.draft_kind == "path"
        return self.draft_steps or max(1, (4 if continued else 5) * self.steps // 6)

    @property
    def same_window(self) -> bool:
        """True if every group trains the same steps, since the window fills its range."""
        start, stop = self.window_range
        return self.trained_steps == stop - start

    @model_validator(mode="after")
    def _window_fits(self) -> RolloutSettings:
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers must be at most workers = {self.workers}, got {self.min_workers}")
        if self.dynamics == "ode":
            return self._without_window()
        start, stop = self.window_range
        last = self.steps - 1
        if not 0 <= start < stop <= last:
            raise ValueError(
                f"the window [{start}, {stop}) must be non-empty and end by step {last}: "
                "the last step removes the last noise and is never trained"
            )
        if self.trained_steps > stop - start:
            raise ValueError(f"window_size {self.window_size} does not fit into the window [{start}, {stop})")
        if self.dynamics == "cps" and self.noise_level > 1:
            raise ValueError(f"noise_level must be at most 1 with cps, got {self.noise_level}")
        return self

    def _without_window(self) -> RolloutSettings:
        """Refuse keys of stochastic steps beside an ODE, which has none."""
        values = {"window_stop": self.window_stop, "window_size": self.window_size, "density": self.density}
        for key, value in {"window_start": self.window_start or None, **values}.items():
            if value is not None:
                raise ValueError(f"{key}: got {value!r}, but dynamics = 'ode' has no stochastic steps")
        return self


def finite(value: Any, where: str = "") -> Any:
    """Return a value unchanged if all numbers in it, at any depth, are finite.

    Raises:
        ValueError: with the place of one that is not.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value}")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, nested in inner:
        finite(nested, f"{where}.{key}" if where else str(key))
    return value


def explain(error: ValidationError, section: str = "") -> str:
    """Name every key (of a section) that is wrong, with its value and what was expected, in one line."""
    return "; ".join(_explain_one(dict(detail), section) for detail in error.errors())


def _explain_one(detail: dict[str, Any], section: str) -> str:
    key = ".".join(filter(None, [section, *map(str, detail["loc"])]))
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key}"
    if detail["type"] == "missing":
        return f"{key} is missing"
    shown = "" if isinstance(detail["input"], dict) else f", got {detail['input']!r}"
    return f"{key}: {message}{shown}" if key else message
