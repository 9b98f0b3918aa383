"""DeepSpeed's configuration, derived from ours and completed by the user's JSON; imports no DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learner.settings import LearnerSettings
from rollout.settings import finite
from rollout.text_files import TextFileError, read_text


def deepspeed_config(settings: LearnerSettings, dtype: str) -> dict[str, Any]:
    """Derive the engine's configuration from the settings, and merge the user's JSON into it.

    Gradient accumulation is ours: each loss carries its exact weight, and `step` is called once per update.

    Raises:
        ValueError: if the user's JSON cannot be read or contradicts our own keys.
    """
    own = _derived(settings, dtype)
    return own if settings.deepspeed is None else _merged(own, _read(settings.deepspeed), settings.deepspeed)


def _derived(settings: LearnerSettings, dtype: str) -> dict[str, Any]:
    half = dtype == "bfloat16"
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": False}
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.max_grad_norm,
        # We detect non-finite gradients ourselves, in the same way for every stage and precision.
        "bf16": {"enabled": half, "check_grad_overflow": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if half and settings.zero_stage > 0:  # without ZeRO, DeepSpeed accumulates in the model's precision
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if settings.zero_stage == 0:  # in float32 DeepSpeed reports no norm then: our optimizer clips instead
        config["gradient_clipping"] = 0.0 if not half else settings.max_grad_norm
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except TextFileError as error:
        raise ValueError(f"learner.deepspeed: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"learner.deepspeed: cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"learner.deepspeed: {path} must hold a JSON object, got {type(found).__name__}")
    finite(found, f"learner.deepspeed: {path}")
    return found


def _merged(own: dict[str, Any], user: dict[str, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    result = dict(own)
    for key, value in user.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(own.get(key, {}), dict):
            result[key] = _merged(own.get(key, {}), value, path, f"{name}.")
        elif key in own and own[key] != value:
            raise ValueError(
                f"learner.deepspeed: {path}: {name} is {value!r}, but the run's own keys say {own[key]!r}; "
                "leave it out of the JSON and set it under [learner]"
            )
        else:
            result[key] = value
    return result
