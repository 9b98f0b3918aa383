"""The suite for GPUs, here on a CPU: what it finds and what it survives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.bench.__main__ import main
from cluster.bench.gpu import right, sizes, suite, waits, whole
from cluster.bench.gpu.attention import attention
from cluster.bench.gpu.check import Check, Outcome, Setup, judged
from cluster.bench.gpu.isolated import Isolation
from cluster.bench.gpu.kernels import busy, kind_of
from cluster.bench.table import Measurement
from learner import engine
from learner.objectives.registry import OBJECTIVES
from rollout import sampler as sampling
from rollout import worker as sampler_worker
from rollout.tools import export
from rollout.tools.tiny_families import TINY

pytestmark = pytest.mark.usefixtures("process_group")

BOTH = ("sampler", "learner")


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """One family is enough to find a fault."""
    for module in (right, waits):
        monkeypatch.setattr(module, "TINY", {"sd3": TINY["sd3"]})
    return Setup("cpu", tmp_path)


def bad(check: Callable[[Setup], Iterator[Measurement]], setup: Setup) -> list[str]:
    """The measurements of a check that are out of bounds."""
    return [row.name for row in check(setup) if not row.good]


def test_a_suite_on_a_cpu_is_right_and_says_how_fast_it_was(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    command = ["gpu", "--device", "cpu", "--random", "tiny", "--only", "right,fast", "--json", str(path)]
    assert main(command) == 0
    report = json.loads(path.read_text())
    assert {one["check"]: one["status"] for one in report["checks"]} == {
        "families": "passed", "half precision": "passed", "objectives": "passed", "export": "passed",
        "waits": "passed", "8-bit optimizer": "skipped", "flash attention": "skipped",
        "model and peak": "passed", "step": "passed", "attention": "skipped",
    }  # fmt: skip
    assert report["machine"]["cores"] == os.cpu_count()
    rows = {row["name"]: row["values"] for one in report["checks"] for row in one["rows"]}
    assert {f"{family}, sde: images (of 255)" for family in ("sd3", "qwen_image")} <= rows.keys()
    assert min(rows["plain loop / step"]) > 0
    assert any("profiled: attention" in name for name in rows)


def test_a_check_that_crashes_hangs_or_raises_takes_no_other_with_it(tmp_path: Path) -> None:
    isolation, seen = Isolation(), []

    def outcome(name: str, seconds: float = 60) -> Outcome:
        check = Check("right", name, f"tests.support.gpu_checks:{name}", seconds)
        return isolation.run(check, Setup("cpu", tmp_path), seconds, seen.append)

    crashed = outcome("crashing")
    assert crashed.status == "failed"
    assert "its process ended: its last words" in crashed.reason
    assert [*crashed.rows] == seen
    hung = outcome("hanging", seconds=3)
    assert "not done within 3 s" in hung.reason
    assert [row.name for row in hung.rows] == ["before"]
    assert outcome("raising").reason.strip().endswith("ValueError: as planted")
    assert outcome("skipping").reason == "not here"
    assert outcome("passing").status == "passed"


def test_kernels_of_attention_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = TINY["flux"].settings(gpus=1).model_dump(include={"width", "height", "text_tokens"})
    monkeypatch.setattr(sizes, "OTHER", sizes.Shape({"batch": 2, **small}, lora_rank=4))
    model = str(TINY["flux"].save(tmp_path / "flux"))
    rows = {row.name: row.values for row in attention(Setup("cpu", tmp_path, model))}
    assert all(min(values) > 0 for values in rows.values())
    assert {
        f"a forward pass with model.attention = {name!r} (s)" for name in ("native", "_native_flash")
    } <= {*rows}


def test_wrong_log_probs_are_found(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    true = sampling.log_prob
    monkeypatch.setattr(sampling, "log_prob", lambda x, move: true(x, move) + 1e-3)
    assert "sd3, sde: on-policy ratios from 1" in bad(right.families, setup)


def test_noise_without_identity_is_found(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "path_noise", lambda noises, step, shape: torch.randn(len(noises), *shape))
    assert {"sd3, sde: images (of 255)", "sd3, sde: log-probs"} <= {*bad(right.families, setup)}


def test_inputs_that_share_memory_are_found(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs and CPUs alike these take other kernels, which round differently in half precision."""

    def shared(values: Any, owners: Any) -> torch.Tensor:
        assert len(values) == 1
        return values[0].expand(len(owners), *values[0].shape)  # type: ignore[no-any-return]

    monkeypatch.setattr(sampler_worker, "_rows", shared)
    assert bad(right.half_precision, setup)


def test_an_optimizer_that_does_nothing_is_found(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)
    cases = sum(len(right.VARIANTS.get(name, [{}])) * len(one.sampling) for name, one in OBJECTIVES.items())
    assert len(bad(right.objectives, setup)) == cases - 1  # guard has no cps


def test_an_export_without_training_is_found(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_fill", lambda transformer, tensors: None)
    assert bad(right.export, setup) == ["pipeline, loaded again: images (of 255)"]


def test_a_wait_in_a_loop_is_found(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    true = sampling.stochastic

    def waiting(settings: Any, x: torch.Tensor, v: torch.Tensor, sigmas: Any) -> Any:
        assert x.isfinite().all().item()
        return true(settings, x, v, sigmas)

    monkeypatch.setattr(sampling, "stochastic", waiting)
    found = bad(waits.waits, setup)  # sampler and learner share the function
    assert {name.partition(" (")[0] for name in found} == {f"sd3: waits of the {one}" for one in BOTH}
    assert all("(test_gpu_suite.py:" in name for name in found)


def test_an_engine_that_clips_differently_is_found(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    true = engine.deepspeed_config
    wrong = {"gradient_clipping": 1e-9}
    monkeypatch.setattr(engine, "deepspeed_config", lambda s: true(s) | (wrong if s.zero_stage == 2 else {}))
    monkeypatch.setattr(whole, "ENGINES", {name: whole.ENGINES[name] for name in ("ZeRO 0", "ZeRO 2")})
    assert bad(whole.engines, setup) == ["ZeRO 2: loss of the second update, apart from ZeRO 0"]


def test_a_speed_below_its_target_is_missed_and_a_wrong_result_has_failed() -> None:
    slow = Measurement("share (%)", [40.0, 41.0, 60.0], least=50)
    assert not slow.good
    assert judged(Check("fast", "step", "", 1), 1, [slow]).status == "missed"
    assert judged(Check("right", "step", "", 1), 1, [slow]).status == "failed"
    assert judged(Check("right", "step", "", 1), 1, []).status == "failed"
    assert not Measurement("nan", [1.0, float("nan"), 2.0], most=3).good
    assert slow.shown() == "share (%): 41.00 (40.00 to 60.00), expected at least 50"


def test_time_that_is_over_skips_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    command = ["gpu", "--device", "cpu", "--minutes", "0", "--only", "export,words", "--json", str(path)]
    assert main(command) == 0
    reasons = [one["reason"] for one in json.loads(path.read_text())["checks"]]
    assert reasons == ["the suite's time is over"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--only", "rihgt"], "--only: got 'rihgt', expected some of"),
        (["--device", "cpu", "--random", "tiny,sd9"], "--random: got 'sd9', expected some of tiny"),
        (["--device", "cpu", "--model", "nowhere"], "--model: nowhere is no folder"),
        (["--minits", "3"], "--minits: no such option"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_a_user_learns_how_to_try_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 2
    assert "no GPU is visible; --device cpu --random tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128", "attention"),
        ("triton_poi_fused_add_mul_3", "compiled, elementwise and reductions"),
        ("Memcpy HtoD (Pinned -> Device)", "copies to and from the host"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>", "normalisation"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<>", "copies and concatenation"),
        ("void cudnn::ops::nchwToNhwcKernel", "copies and concatenation"),
    ],
)
def test_kernels_are_told_apart(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_kernels_that_overlap_count_once() -> None:
    assert busy([("a", 0, 4), ("b", 2, 4), ("c", 10, 1)]) == 7


def test_every_check_of_the_suite_exists() -> None:
    for check in (*suite.RIGHT, *suite.FAST, *suite.WHOLE):
        assert callable(check.function())
