"""The plan: its output, its errors, and its sums over stages and roles."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.config.errors import UserError
from cluster.config.preflight import check
from cluster.config.sources import resolve
from cluster.plan import cpu as plan_cpu
from cluster.plan import gpu as plan_gpu
from cluster.plan import measure as plan_roles
from cluster.plan.__main__ import main, shortages
from cluster.plan.estimate import Batch, Estimate, Hardware, Need, Speed
from cluster.plan.measure import Measured
from cluster.plan.placement import crowded, place
from cluster.plan.reward_costs import COSTS
from cluster.plan.room import room
from cluster.plan.speed import measured
from rewards.settings import RewardSettings
from rollout.families.published import PUBLISHED_SIZES
from rollout.tools.model_costs import Cost, Sizes
from rollout.tools.random_models import PUBLISHED

HARDWARE = Hardware(gpus=8, memory=80e9, speed=Speed(sampling=0.5e15, learning=0.5e15, basis="a guess"))
SIZES = Sizes(
    parameters=2_000_000, trained=1_000_000, weights=4e6, autoencoder=1e6, pairs=8, latent=16 * 64 * 64,
    sampling=Cost(flops=1e12, live=3e6), training=Cost(flops=2e12, live=9e6),
    reference=Cost(flops=5e11, live=2e6), decoding=Cost(flops=1e11, live=5e6),
)  # fmt: skip


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_gpu, "sizes_of", lambda *_, **__: SIZES)


def gpu(**overrides: Any) -> Estimate:
    return plan_gpu.estimate(resolve("sd35-geneval", overrides), HARDWARE)


@pytest.mark.usefixtures("counted")
def test_objectives_on_the_forward_process_count_their_own_passes() -> None:
    nft = {"name": "nft", "draws": 4, "kl_weight": 0.1}
    drafted = {"dynamics": "ode", "draft": "ode", "draft_steps": 5}
    plain = gpu(learner={"objective": nft}, rollout=drafted, selection={"drafts": 96})
    # 48 x 24 candidates of 4 draws, with the start policy's pass, and half with the behaviour policy's
    assert plain.stages["learn"] == pytest.approx(48 * 24 * 4 / 8 * 2.75e12 / (0.5e15 * 8))
    # 48 groups of 48 in full, after 96 drafts of 5 steps of 10
    passes = 48 * 48 * 10 + 48 * 96 * 5
    decodes = 48 * (48 + 96) / 12 * 1e11 / plan_gpu.FLOAT32
    assert plain.parts["sample"] == pytest.approx((passes / 12 * 1e12 + decodes) / (0.5e15 * 8))
    (learner,) = [need for need in plain.needs if need.role == "learner"]
    # of 72 candidates per rank and update, the second update's velocities are kept
    assert learner.parts["velocities"] == pytest.approx(72 * 4 * 16 * 64 * 64 * 4)
    lagging = gpu(learner={"objective": nft | {"behaviour_decay": 0.5}}, rollout={"dynamics": "ode"})
    assert lagging.stages["learn"] == pytest.approx(48 * 24 * 4 / 8 * 3e12 / (0.5e15 * 8))
    (slow,) = [need for need in lagging.needs if need.role == "learner"]
    assert slow.parts["average"] == 2 * learner.parts["average"]


@pytest.mark.usefixtures("counted")
def test_seconds_follow_from_operations() -> None:
    found = gpu()
    # 48 groups of 48 in batches of 12, on 8 GPUs in turn with the rest; decoding is in float32
    sample = 48 * 4 * (10 * 1e12 + 1e11 / plan_gpu.FLOAT32) / (0.5e15 * 8)
    assert found.parts["sample"] == pytest.approx(sample)
    score = 48 * 48 * COSTS["geneval"].flops / (0.5e15 * 8)
    assert found.stages["sample and score"] == pytest.approx(sample + score)  # on the same GPUs
    # 48 x 24 candidates of 9 trained steps in passes of 8, 8 ranks, with reference, half with old log-probs
    assert found.stages["learn"] == pytest.approx(48 * 24 * 9 / 8 * 2.75e12 / (0.5e15 * 8))
    assert found.step == pytest.approx(sum(found.stages.values()))
    # Nothing is gained by sampling ahead on the learner's own GPUs.
    assert gpu(max_staleness=1).step == pytest.approx(found.step)
    screened = gpu(selection={"drafts": 96}, rollout={"draft_steps": 4})
    more = 48 * 4 * 4 * 1e12 + 48 * 8 * 1e11 / plan_gpu.FLOAT32
    assert screened.parts["sample"] == pytest.approx(sample + more / (0.5e15 * 8))
    assert gpu(learner={"beta": 0.0}).stages["learn"] == pytest.approx(found.stages["learn"] * 2.25 / 2.75)
    sampled = gpu(learner={"objective": {"old_log_probs": "sampler"}})
    assert sampled.stages["learn"] == pytest.approx(found.stages["learn"] * 2.5 / 2.75)


APART: dict[str, Any] = {"rollout": {"workers": 4, "gpus": 1}, "learner": {"ranks": 3, "gpus": 1}}


@pytest.mark.usefixtures("counted")
def test_roles_on_gpus_of_their_own_overlap() -> None:
    found = gpu(**APART)
    assert found.parts["sample"] == pytest.approx(2 * gpu().parts["sample"])
    score = 48 * 48 * COSTS["geneval"].flops / 0.5e15  # eight replicas on one GPU, beside the samplers
    assert found.stages["sample and score"] == pytest.approx(max(found.parts["sample"], score))
    assert gpu(**APART, max_staleness=1).step == pytest.approx(max(found.stages.values()))
    half = gpu(rollout={"gpus": 0.5, "workers": 8}, learner=APART["learner"])  # two on each GPU
    assert half.parts["sample"] == pytest.approx(found.parts["sample"])


@pytest.mark.usefixtures("counted")
def test_the_slower_of_samplers_and_readers_decides() -> None:
    def ocr(workers: int) -> Estimate:
        reward = {"name": "ocr", "options": {"mode": "full"}, "workers": workers}
        return plan_gpu.estimate(resolve("sd35-ocr", {"rewards": [reward]}), HARDWARE)

    assert ocr(2).stages["sample and score"] == pytest.approx(48 * 48 * 0.38 / 2)
    assert ocr(100_000).stages["sample and score"] == pytest.approx(ocr(100_000).parts["sample"])


@pytest.mark.usefixtures("counted")
def test_a_reward_of_unknown_cost_is_named() -> None:
    judge = {"name": "judge", "options": {"base_url": "http://127.0.0.1:1/v1", "model": "m"}}
    assert "not counted: the reward judge, weights" in gpu(rewards=[judge]).basis


def test_shares_are_placed_as_ray_fills_them_up() -> None:
    def need(role: str, count: int, gpus: float) -> Need:
        return Need(role, count, gpus, {}, 80e9)

    whole = place([need("learner", 2, 1), need("rollout", 3, 0.5), need("readers", 4, 0)])
    assert [dict(gpu) for gpu in whole.gpus] == [
        {"learner": 1},
        {"learner": 1},
        {"rollout": 2},
        {"rollout": 1},
    ]
    turns = place([need("learner", 3, 0.6), need("rollout", 3, 0.3), need("geneval", 3, 0.1)])
    assert [dict(gpu) for gpu in turns.gpus] == [{"learner": 1, "rollout": 1, "geneval": 1}] * 3
    assert (turns.hosts("rollout"), turns.shared("rollout", "learner")) == (3, True)
    assert not whole.shared("rollout", "learner")
    assert len(place([need("learner", 1, 2)]).gpus) == 2


def test_processes_that_share_a_gpu_must_fit_together() -> None:
    needs = [
        Need("learner", 2, 0.6, {"weights": 50e9}, 80e9),
        Need("rollout", 2, 0.3, {"weights": 40e9}, 80e9),
    ]
    assert crowded(needs, 80e9) == [
        "1 learner + 1 rollout on one GPU need 90.0 GB together, and it has 80.0 GB"
    ]
    assert crowded(needs, 96e9) == []
    assert shortages(Estimate({}, needs, False, ""), HARDWARE) == crowded(needs, 80e9)


def test_room_is_what_the_fullest_gpu_leaves() -> None:
    needs = [
        Need("learner", 2, 0.6, {"weights": 20e9, "activations": 8e9}, 80e9),
        Need("rollout", 1, 0.3, {"weights": 20e9, "activations": 4e9}, 80e9),
    ]
    sampler, learner = Batch("rollout.batch", "rollout", 8, 999), Batch("micro_batch", "learner", 4, 999)
    assert room(needs, [sampler, learner], 80e9) == [
        "rollout.batch up to about 48 (now 8)",  # 72 GB - 52 GB are five times 4 GB
        "micro_batch up to about 14 (now 4)",  # 2.5 times 8 GB, beside the sampler
    ]
    assert room(needs, [replace(sampler, most=9)], 80e9) == []
    assert room(needs, [sampler], 56e9) == []


def test_the_published_run_takes_at_most_450_gpu_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sd35-geneval", "--gpus", "8"]) == 0
    hours = re.search(r"GPU-hours\W+(\d+)", capsys.readouterr().out)
    assert hours is not None
    assert int(hours[1]) <= 450


def parts(estimate: Estimate, role: str) -> dict[str, float]:
    return {name: size for need in estimate.needs if need.role == role for name, size in need.parts.items()}


@pytest.mark.usefixtures("counted")
def test_roles_hold_what_their_settings_say() -> None:
    found = parts(gpu(), "learner")  # ZeRO 1 on 8 ranks, an adapter in float32
    assert found["optimizer"] == pytest.approx(8e6 / 8)
    assert found["gradients"] == pytest.approx(4e6)
    assert found["reference"] == 0
    whole = parts(gpu(model={"lora_rank": 0}, learner={"zero_stage": 3}), "learner")
    assert whole["weights"] == whole["reference"] == pytest.approx(4e6 / 8)
    assert parts(gpu(learner={"offload": "optimizer"}), "learner")["optimizer"] == 0
    assert (found["gathered"], whole["gathered"]) == (0, pytest.approx(4e6))  # a layer's at most, here all
    divided = parts(gpu(learner={"sequence_parallel": 4}), "learner")
    assert divided["activations"] == pytest.approx(found["activations"] / 4)
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
        (["sd35-ocr", "--model.path", "some/model"], "model.path: some/model is neither a folder nor one of"),
        (["sd35-ocr", "--measured", "none.json"], "--measured: none.json is no report of 'bench gpu'"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_every_published_model_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["flux-pickscore", "--gpus", "8", "--model.path", "black-forest-labs/FLUX.2-dev"]
    assert main(arguments) == 1
    shown = " ".join(capsys.readouterr().out.split())
    # The text encoders apart, each process fits on a GPU, but not all of them together.
    assert "does not fit: 1 learner + 1 rollout + 1 pickscore on one GPU need" in shown
    assert "GPU-hours" in shown
    assert {*PUBLISHED} == {*PUBLISHED_SIZES}


@pytest.mark.slow
def test_flux_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flux-pickscore", "--gpus", "8"]) == 0


@pytest.fixture
def measured_card(tmp_path: Path) -> Path:
    """A report of the suite: a peak of 1e15, of which compiled sampler and learner reach 60% and 50%."""
    rows = {
        "peak of matrix products in bfloat16 (TFLOP/s)": [999.0, 1000.0, 1001.0],
        "compiled: images of a batch": [16],
        "compiled: pixels of an image": [512 * 512],
        "compiled: decoding them (s)": [0.25, 0.1, 0.9],
        "compiled: forward passes, share of the peak (%)": [60.0],
        "compiled: learner, share of the peak (%)": [50.0],
    }
    checks = [{"rows": [{"name": name, "values": values} for name, values in rows.items()]}]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"machine": {"gpu": "A card"}, "checks": checks}))
    return path


@pytest.mark.usefixtures("counted")
def test_a_measured_card_replaces_the_guess(measured_card: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed = measured(measured_card, compiled=True)
    assert speed.sampling == pytest.approx(0.6e15)
    assert speed.learning == pytest.approx(0.5e15)
    assert speed.pixels == pytest.approx(16 * 512 * 512 / 0.25)
    found = plan_gpu.estimate(resolve("sd35-geneval", {}), replace(HARDWARE, speed=speed))
    sample = 48 * 4 * 10 * 1e12 / (0.6e15 * 8) + 48 * 48 * 512 * 512 / (speed.pixels or 0) / 8
    assert found.parts["sample"] == pytest.approx(sample)
    assert main(["sd35-geneval", "--measured", str(measured_card)]) == 0
    assert "measured on one A card with compiled blocks" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="has no measurement 'not compiled: images of a batch'"):
        measured(measured_card, compiled=False)


@pytest.mark.usefixtures("counted")
def test_a_guess_says_that_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sd35-geneval"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "396 TFLOP/s per GPU, 40% of the peak, a guess for compiled models" in shown
    assert main(["sd35-geneval", "--model.compile", "false"]) == 0
    assert "20% of the peak, a guess for not compiled models" in " ".join(capsys.readouterr().out.split())


def stand(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, drafts: int = 0) -> Estimate:
    """Estimate ``shapes`` on two cores: 8 chunks, 2 samplers of a thread, a learner of 2 threads."""

    def alone(work: Any, *_: Any) -> Measured:
        chunk = SimpleNamespace(images=np.zeros((1, 32, 32, 3), dtype=np.uint8))
        return Measured(seconds[work.__name__], 1e9, [chunk] if work is plan_roles.sampler else None)

    monkeypatch.setattr(plan_cpu, "alone", alone)
    monkeypatch.setattr(plan_cpu.psutil, "cpu_count", lambda: 2)
    return plan_cpu.estimate(resolve("shapes", {"selection": {"drafts": drafts}}))


def test_on_cpus_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = stand({"sampler": 0.1, "reward": 0.001, "learner": 0.5}, monkeypatch)
    assert found.stages["sample and score"] == pytest.approx(max(4 * 0.1 + 0.001, 8 * 0.101 / 2))
    assert found.stages["learn"] == pytest.approx(0.5)
    (need,) = found.needs
    assert need.parts["rollout"] == 2e9
    assert need.parts["rewards"] == need.parts["learner"] == 1e9
    thorough = stand({"sampler": 0.1, "reward": 0.001, "learner": 0.5}, monkeypatch, drafts=32)
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
