"""The benchmark of one driver, at a small size: the real loop with samplers that sleep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.bench import scale as bench_scale
from cluster.bench.__main__ import main

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_driver_keeps_simulated_samplers_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WARMUP": 1, "STEPS": 2, "STORE_GB": 0.5}.items():
        monkeypatch.setattr(bench_scale, name, value)
    path = tmp_path / "scale.json"
    assert main(["scale", "--samplers", "2", "--repeats", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    rates = rows["2 samplers: candidates per second"]
    assert len(rates) == 2
    assert 0 < min(rates) <= max(rates) <= 1.05 * 2 * bench_scale.CANDIDATES
    assert min(rows["  driver's memory, MB"]) > 0
