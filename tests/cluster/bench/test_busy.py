"""A run beside busy processes: the scheduling of its workers, and its benchmark."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.actors import actor_spec as placement
from cluster.actors.actor_spec import ActorSpec, spawn
from cluster.actors.connection import SHARING, connect
from cluster.bench import busy as bench_busy
from cluster.bench.__main__ import main
from cluster.bench.busy import busy
from cluster.config.settings import ClusterSettings

NICENESS = "RAY_worker_niceness"


@pytest.mark.ray
def test_workers_of_a_node_of_ours_are_no_less_than_their_neighbours(node: None) -> None:
    actor = spawn(ActorSpec(name="rollout", target="tests.support.workers:Echo", threads=2), 0)
    worker = psutil.Process(ray.get(actor.pid.remote()))
    assert worker.nice() == psutil.Process().nice()
    assert worker.environ()["GOMP_SPINCOUNT"] == SHARING["GOMP_SPINCOUNT"]
    ray.kill(actor)


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv(NICENESS, "15")
    monkeypatch.setattr(placement.ray, "init", lambda **_: None)
    connect(ClusterSettings(object_store_gb=0.1))
    assert os.environ[NICENESS] == "15"
    assert os.environ["GOMP_SPINCOUNT"] == SHARING["GOMP_SPINCOUNT"]


def neighbours() -> list[psutil.Process]:
    """List the children of this process that keep cores busy."""
    return [child for child in psutil.Process().children() if "while True: pass" in child.cmdline()]


def test_neighbours_keep_cores_busy_and_end() -> None:
    with busy(2):
        started = neighbours()
        assert len(started) == 2
    assert not any(neighbour.is_running() for neighbour in started)


def test_variants_and_neighbours_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    turns: list[tuple[int, dict[str, str]]] = []

    def train(options: Any, rest: Any, variables: dict[str, str]) -> list[dict[str, float]]:
        count = len(neighbours())
        turns.append((count, variables))
        seconds = 1.0 + count
        late = {"seconds_step": seconds, "seconds_sample": 0.4, "seconds_learn": 0.6}
        return [dict.fromkeys(late, 99.0)] * bench_busy.WARMUP + [late] * 3

    monkeypatch.setattr(bench_busy, "_train", train)
    command = ["busy", "--repeats", "2", "--neighbours", "0", "1", "--variant", "A=1,B=2"]
    assert main([*command, "--json", str(tmp_path / "busy.json")]) == 0
    assert turns == [(0, {}), (0, {"A": "1", "B": "2"}), (1, {}), (1, {"A": "1", "B": "2"})] * 2
    found = json.loads((tmp_path / "busy.json").read_text())["rows"]
    assert found["plain, 0 beside: step (s)"] == [1.0, 1.0]
    assert found["A=1,B=2, 1 beside: step (s)"] == [2.0, 2.0]


@pytest.mark.parametrize("variant", ["A", "=1", "A=1,B"])
def test_a_variant_that_is_none_is_refused(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["busy", "--variant", variant]) == 2
    assert "expected NAME=VALUE" in capsys.readouterr().err
