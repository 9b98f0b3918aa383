"""The suite's part with the service: a run whose sampler is killed, and one that is resumed exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.bench.__main__ import main

pytestmark = pytest.mark.ray


def test_the_whole_service_passes(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    command = ["gpu", "--device", "cpu", "--minutes", "20", "--only", "whole", "--json", str(path)]
    assert main(command) == 0
    checks = {one["check"]: one for one in json.loads(path.read_text())["checks"]}
    assert {name: one["status"] for name, one in checks.items()} == {
        "engines": "passed", "service": "passed", "preference": "skipped", "words": "skipped"
    }  # fmt: skip
    rows = {row["name"]: row["values"] for row in checks["service"]["rows"]}
    assert rows["samplers restarted"] >= [1]
    assert rows["losses of a run resumed at step 3, apart"] == [0]
