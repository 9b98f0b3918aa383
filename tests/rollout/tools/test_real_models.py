"""Models of real sizes: their thin text encoders give the transformer what it expects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rollout.families.registry import load_policy
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.random_models import save_configs
from rollout.tools.real_models import REAL

EACH = ["flux1-dev", "flux2-dev", "flux2-klein-base-4b", "qwen-image", "z-image", "sana-1.6b"]


@pytest.mark.parametrize("name", EACH)
def test_thin_text_encoders_have_the_width_that_the_transformer_sees(name: str, tmp_path: Path) -> None:
    save_configs(name, tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    for part, module in REAL[name].text().items():
        module.save_pretrained(tmp_path / part)
        index[part] = ["transformers", type(module).__name__]
    path.write_text(json.dumps(index))
    model, rollout = ModelSettings(path=str(tmp_path)), RolloutSettings(gpus=0)
    policy = load_policy(model, rollout, device="meta", seed=0, whole=False)
    policy.load_text("cpu")
    assert policy.text_shapes(77) == {key: (*value.shape,) for key, value in policy.embed("a cat").items()}
