"""DeepSpeed's configuration, derived from ours and completed by the user's JSON; imports no DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learner.settings import LearnerSettings
from rollout.settings import finite
from rollout.text_files import TextFileError, read_text


def deepspeed_config(settings: LearnerSettings) -> dict[str, Any]:
    """Derive the engine's configuration from the settings, and merge the user's JSON into it.

    Gradient accumulation is ours: each loss carries its exact weight, and `step` is called once per update.
    Precision is ours as well: for DeepSpeed all trained parameters are float32.

    Raises:
        ValueError: if the user's JSON cannot be read or contradicts our own keys.
    """
    own = _derived(settings)
    return own if settings.deepspeed is None else _merged(own, _read(settings.deepspeed), settings.deepspeed)


def _derived(settings: LearnerSettings) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": False}
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Without ZeRO, DeepSpeed reports no norm: our optimizer clips instead.
        "gradient_clipping": settings.max_grad_norm if settings.zero_stage else 0.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


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
