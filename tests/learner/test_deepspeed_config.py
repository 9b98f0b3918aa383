"""DeepSpeed's configuration: derived from ours, and merged with a user's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from learner.deepspeed_config import deepspeed_config
from learner.settings import LearnerSettings


def written(folder: Path, content: Any) -> Path:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(content))
    return path


def test_a_users_json_adds_what_has_no_key_of_ours(tmp_path: Path) -> None:
    extra = {
        "zero_optimization": {"reduce_bucket_size": 10_000_000, "stage": 2},
        "dump_state": True,
    }
    settings = LearnerSettings(zero_stage=2, deepspeed=written(tmp_path, extra))
    found = deepspeed_config(settings)
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 10_000_000}
    assert found["dump_state"] is True
    assert found["gradient_clipping"] == settings.max_grad_norm


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but the run's own keys say 2"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but the run's own keys say False"),
        ({"bf16": True}, "bf16 is True"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4"),
        ([1], "must hold a JSON object, got list"),
    ],
)
def test_a_conflict_is_an_error_that_names_the_key(tmp_path: Path, content: Any, named: str) -> None:
    settings = LearnerSettings(zero_stage=2, deepspeed=written(tmp_path, content))
    with pytest.raises(ValueError, match=r"learner\.deepspeed: .*deepspeed\.json") as caught:
        deepspeed_config(settings)
    assert named in str(caught.value)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    for content in ("{", None):
        path.unlink(missing_ok=True)
        if content:
            path.write_text(content)
        with pytest.raises(ValueError, match=r"learner\.deepspeed: cannot read .*broken\.json"):
            deepspeed_config(LearnerSettings(deepspeed=path))


def test_a_byte_order_mark_is_no_part_of_the_json_and_utf16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "windows.json"
    path.write_text('{"dump_state": true}', encoding="utf-8-sig")
    assert deepspeed_config(LearnerSettings(deepspeed=path))["dump_state"] is True
    path.write_text("{}", encoding="utf-16")
    with pytest.raises(ValueError, match=r"learner\.deepspeed: .*windows\.json: is UTF-16; save it"):
        deepspeed_config(LearnerSettings(deepspeed=path))


def test_offload_moves_to_the_cpu_what_it_says() -> None:
    def zero(**changes: Any) -> Any:
        return deepspeed_config(LearnerSettings(**changes))["zero_optimization"]

    assert zero(zero_stage=2, offload="optimizer")["offload_optimizer"] == {"device": "cpu"}
    assert "offload_param" not in zero(zero_stage=3, offload="optimizer")
    both = zero(zero_stage=3, offload="parameters")
    assert both["offload_optimizer"] == both["offload_param"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 0, "offload": "optimizer"}, "needs zero_stage 1, 2 or 3"),
        ({"zero_stage": 2, "offload": "parameters"}, "needs zero_stage 3, got 2"),
        ({"gpus": 0, "optimizer": "adamw8bit"}, "works on GPUs only"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerSettings(**changes)
