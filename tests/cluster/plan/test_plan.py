"""The plan: its output, its errors, and its sums over stages and roles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.config.preflight import check
from cluster.config.sources import resolve
from cluster.plan import cpu as plan_cpu
from cluster.plan import gpu as plan_gpu
from cluster.plan import measure as plan_roles
from cluster.plan.__main__ import main, shortages
from cluster.plan.estimate import Estimate, Hardware, Need
from cluster.plan.measure import Measured
from rewards.settings import RewardSettings
from rollout.tools.model_costs import Cost, Sizes

HARDWARE = Hardware(gpus=8, memory=80e9, flops=1e15, share=0.5)
SIZES = Sizes(
    parameters=2_000_000, trained=1_000_000, weights=4e6, autoencoder=1e6, pairs=8,
    sampling=Cost(flops=1e12, live=3e6), training=Cost(flops=2e12, live=9e6),
    reference=Cost(flops=5e11, live=2e6), decoding=Cost(flops=1e11, live=5e6),
)  # fmt: skip


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_gpu, "sizes_of", lambda *_, **__: SIZES)


def gpu(**overrides: Any) -> Estimate:
    return plan_gpu.estimate(resolve("sd35-geneval", overrides), HARDWARE)


@pytest.mark.usefixtures("counted")
def test_seconds_follow_from_operations() -> None:
    found = gpu()
    # 48 groups of 48 in batches of 16, on 4 samplers; decoding in float32 is 15 times as slow
    assert found.stages["sample"] == pytest.approx(48 * 3 * (10 * 1e12 + 15 * 1e11) / (0.5e15 * 4))
    # 48 x 24 candidates of 9 trained steps in passes of 8, on 3 ranks, with the reference
    assert found.stages["learn"] == pytest.approx(48 * 24 * 9 / 8 * 2.5e12 / (0.5e15 * 3))
    assert found.step == pytest.approx(sum(found.stages.values()))
    assert gpu(max_staleness=1).step == pytest.approx(max(found.stages.values()))
    half = gpu(rollout={"gpus": 0.5, "workers": 8})  # two on each GPU
    assert half.stages["sample"] == pytest.approx(found.stages["sample"])
    screened = gpu(selection={"previews": 96}, rollout={"preview_steps": 4})
    more = 48 * 3 * 4 * 1e12 + 48 * 6 * 15 * 1e11
    assert screened.stages["sample"] == pytest.approx(found.stages["sample"] + more / (0.5e15 * 4))
    assert gpu(learner={"beta": 0.0}).stages["learn"] == pytest.approx(found.stages["learn"] * 2 / 2.5)


def parts(estimate: Estimate, role: str) -> dict[str, float]:
    return {name: size for need in estimate.needs if need.role == role for name, size in need.parts.items()}


@pytest.mark.usefixtures("counted")
def test_roles_hold_what_their_settings_say() -> None:
    found = parts(gpu(), "learner")  # ZeRO 1 on 3 ranks, bfloat16 with an adapter
    assert found["optimizer"] == pytest.approx(12e6 / 3)
    assert found["gradients"] == pytest.approx(4e6)
    assert found["reference"] == 0
    whole = parts(gpu(model={"lora_rank": 0}, learner={"zero_stage": 3}), "learner")
    assert whole["weights"] == whole["reference"] == pytest.approx(4e6 / 3)
    assert parts(gpu(learner={"offload": "optimizer"}), "learner")["optimizer"] == 0
    assert parts(gpu(), "rollout")["encoders"] > 10e9
    assert parts(gpu(rollout={"offload_text": True}), "rollout")["encoders"] == 0


def test_what_does_not_fit_is_said_with_the_arithmetic() -> None:
    needs = (Need("rollout", 4, 1, {"weights": 90e9}, 80e9), Need("learner", 6, 1, {"weights": 1e9}, 80e9))
    found = shortages(Estimate({}, needs, False, ""), HARDWARE)
    assert found == [
        "rollout needs 90.0 GB and has 80.0 GB",
        "4 x 1 rollout + 6 x 1 learner = 10 GPUs, but 8 are available",
    ]
    assert not shortages(Estimate({}, needs[1:], False, ""), HARDWARE)


@pytest.mark.usefixtures("counted")
def test_the_table_and_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sd35-geneval", "--gpus", "8", "--gpu-memory", "80GB", "--price", "2"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("rollout", "learner", "geneval", "GPU-hours", "cost", "2000 steps"))
    assert main(["sd35-geneval", "--gpus", "4", "--gpu-memory", "8GiB"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "does not fit: rollout needs 12.7 GB and has 8.6 GB" in shown
    assert "= 8 GPUs, but 4 are available" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which preset or TOML file?"),
        (["nope"], "no preset or TOML file 'nope'"),
        (["shapes", "--gpu-memory", "lots"], "--gpu-memory: got 'lots', expected a size such as 80GB"),
        (["shapes", "--share", "2"], "--share: got '2', expected a number above 0 and at most 1"),
        (["shapes", "--gpus", "none"], "--gpus: got 'none', expected a number above 0"),
        (["shapes", "--learner.bta", "1"], "unrecognized arguments: --learner.bta"),
        (["sd35-ocr", "--model.path", "some/model"], "model.path: some/model is not a folder"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def stand(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, previews: int = 0) -> Estimate:
    """Estimate ``shapes`` on two cores: 8 chunks, 2 samplers of a thread, a learner of 2 threads."""

    def alone(work: Any, *_: Any) -> Measured:
        chunk = SimpleNamespace(images=np.zeros((1, 32, 32, 3), dtype=np.uint8))
        return Measured(seconds[work.__name__], 1e9, [chunk] if work is plan_roles.sampler else None)

    monkeypatch.setattr(plan_cpu, "alone", alone)
    monkeypatch.setattr(plan_cpu.psutil, "cpu_count", lambda: 2)
    return plan_cpu.estimate(resolve("shapes", {"selection": {"previews": previews}}))


def test_on_cpus_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = stand({"sampler": 0.1, "reward": 0.001, "learner": 0.5}, monkeypatch)
    assert found.stages["sample and score"] == pytest.approx(max(4 * 0.1 + 0.001, 8 * 0.101 / 2))
    assert found.stages["learn"] == pytest.approx(0.5)
    (need,) = found.needs
    assert need.parts["rollout"] == 2e9
    assert need.parts["rewards"] == need.parts["learner"] == 1e9
    thorough = stand({"sampler": 0.1, "reward": 0.001, "learner": 0.5}, monkeypatch, previews=32)
    assert thorough.stages["sample and score"] == pytest.approx(8 * 0.1 + 0.001)  # 8 (1 + 5 / 6) batches
    crowded = stand({"sampler": 0.1, "reward": 0.05, "learner": 0.5}, monkeypatch)
    assert crowded.stages["sample and score"] == pytest.approx(8 * 0.15 / 2)


def test_a_role_is_measured_in_a_process_of_its_own() -> None:
    images = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    prompt = check(resolve("shapes", {})).train[0]
    found = plan_roles.alone(plan_roles.reward, RewardSettings(name="shapes"), images, prompt)
    assert 0 < found.seconds < 10
    assert 2e7 < found.memory < 2e9
    assert len(found.output.values) == 4


@pytest.mark.slow
def test_a_preset_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shapes", "--steps", "7"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "7 steps" in shown
    assert "3 measurements of each role's work" in shown
