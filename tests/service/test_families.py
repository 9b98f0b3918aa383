"""Every family through the whole service: sampled, scored, selected, trained, published and evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rollout.tools.tiny_families import TINY
from tests.support.service_process import FLAGS, Service, metrics_of, prepare

pytestmark = [pytest.mark.ray, pytest.mark.slow]


DIVIDED = "--learner.ranks 2 --learner.sequence_parallel 2 --learner.zero_stage 3"


@pytest.mark.parametrize(
    ("name", "learner"),
    [*((name, "") for name in TINY if name != "sd3"), ("wan", DIVIDED)],  # SD3's is every other test
)
def test_a_family_trains_end_to_end(name: str, learner: str, tmp_path: Path) -> None:
    rollout = TINY[name].settings(gpus=0, workers=1)
    model = TINY[name].save(tmp_path / "model")
    sizes = {"width", "height", "frames", "guidance", "text_tokens"}
    flags = [f"--rollout.{key}={getattr(rollout, key)}" for key in sorted(sizes)]
    inputs = prepare(tmp_path, model)
    inputs[inputs.index("--rewards") + 1] = '[{"name": "jpeg"}]'  # the world's own reward wants its size
    more = "--model.lora_rank 4 --steps 2 --learner.learning_rate 0.03 --learner.ema_every 1 --folder".split()
    run = tmp_path / "run"
    service = Service(["shapes", *FLAGS, *inputs, *flags, *learner.split(), *more, str(run)], run)
    try:
        assert service.finish() == 0, service.output
    finally:
        service.end()
    last = metrics_of(run)[-1]
    assert last["step"] == 2
    assert last["grad_norm"] > 0
    assert np.isfinite([last["reward_mean"], last["eval_reward"]]).all()
    before, after = (
        np.asarray(Image.open(run / "images" / f"eval-{step:06d}" / "p000-s0.png")).astype(int)
        for step in (0, 2)
    )
    assert before.shape == (rollout.height, rollout.width, 3)
    assert np.abs(after - before).max() > 1  # training reached what is evaluated
