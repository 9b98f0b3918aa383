"""Objectives on the forward process, as a service: killed and resumed, or on two samplers, the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from learner.records import BEHAVIOUR
from tests.support.service_process import Service, ledger_of, metrics_of, prepare, services, timeless

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, EVERY = 8, 2
FLAGS = f"""
--steps {STEPS} --groups_per_step 2 --selection.candidates 6 --selection.keep 4 --eval_every {STEPS}
--eval_samples 1 --image_every 100 --checkpoint_every {EVERY} --keep_checkpoints 9 --rollout.steps 3
--rollout.eval_steps 2 --rollout.dynamics ode --rollout.batch 4 --learner.threads 1 --learner.ema_every 2
--cluster.object_store_gb 0.2 --guard.action off
""".split()
OBJECTIVES = {
    "nft, lagging": """--learner.objective.name nft --learner.objective.behaviour_decay 0.5
        --learner.objective.behaviour_ramp 0.1 --selection.drafts 8 --rollout.draft_steps 2""",
    "awm": "--learner.objective.name awm --rollout.solver dpm2 --selection.adaptive 4",
    "dpo": "--learner.objective.name dpo --model.lora_rank 4",
}
Start = Callable[..., Service]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Iterator[Start]:
    home = tmp_path_factory.mktemp("objectives")
    inputs = prepare(home, pipeline_folder, [{"name": "jpeg"}])
    with services() as started:

        def begin(name: str, *flags: str, resume: bool = False) -> Service:
            folder = home / name
            fresh = ["shapes-nft", *FLAGS, *inputs, "--folder", str(folder), *flags]
            return started(["--resume", str(folder)] if resume else fresh, folder)

        yield begin


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_that_is_killed_and_resumed_is_the_undisturbed_one(start: Start, name: str) -> None:
    """The undisturbed one has two samplers, the other one."""
    flags, place = OBJECTIVES[name].split(), name.partition(",")[0]
    whole = start(f"{place}-whole", *flags, "--rollout.workers", "2")
    assert whole.finish() == 0, whole.output
    killed = start(f"{place}-killed", *flags, "--rollout.workers", "1")
    killed.wait_for_step(EVERY * 2 + 1)
    killed.kill()
    again = start(f"{place}-killed", resume=True)
    assert again.finish() == 0, again.output
    assert len(metrics_of(again.folder)) == STEPS + 1
    for one, other in zip(timeless(again.folder), timeless(whole.folder), strict=True):
        counts = {"samplers", "restarts"}
        assert {k: v for k, v in one.items() if k not in counts} == {
            k: v for k, v in other.items() if k not in counts
        }
    assert ledger_of(again.folder) == ledger_of(whole.folder)
    last = f"checkpoints/step-{STEPS}"
    files = {"weights.safetensors", "average.safetensors", *([BEHAVIOUR] if "lagging" in name else [])}
    assert files == {path.name for path in (whole.folder / last).glob("*.safetensors")}
    for file in files:
        found, expected = (load_file(one.folder / last / file) for one in (again, whole))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in found)
