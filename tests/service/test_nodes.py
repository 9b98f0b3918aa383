"""Nodes that join and die during a run: samplers change with them, the result does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.ray_nodes import Nodes, nodes
from tests.support.service_process import (
    REWARDS,
    Service,
    ledger_of,
    metrics_of,
    prepare,
    services,
    timeless,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, EVERY = 24, 6
BRAKE = "brake"
FLAGS = f"""
--steps {STEPS} --groups_per_step 3 --selection.candidates 4 --selection.keep 2 --eval_every 12
--eval_samples 1 --image_every 100 --checkpoint_every {EVERY} --rollout.steps 3 --rollout.eval_steps 2
--rollout.batch 2 --learner.threads 2 --cluster.object_store_gb 0.2
""".split()

Start = Callable[..., Service]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def start(home: Path, pipeline_folder: Path) -> Iterator[Start]:
    options = {"seconds": 0.5, "slow_while": str(home / BRAKE)}
    slow = {"name": "tests.support.scorers:SlowScorer", "options": options}
    inputs = prepare(home, pipeline_folder, [*REWARDS, slow])
    with services() as started:
        yield lambda name, *flags: started(
            ["shapes", *FLAGS, *inputs, "--folder", str(home / name), *flags], home / name
        )


@pytest.fixture(scope="module")
def finished(start: Start) -> Service:
    service = start("reference", "--rollout.workers", "1")
    assert service.finish() == 0, service.output
    return service


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    with nodes() as made:
        yield made


@pytest.fixture
def brake(home: Path) -> Iterator[Path]:
    """The file that, while it exists, slows the steps of all runs to six seconds or more."""
    yield home / BRAKE
    (home / BRAKE).unlink(missing_ok=True)


def same_run(found: Path, expected: Path) -> None:
    assert timeless(found) == timeless(expected)
    assert ledger_of(found) == ledger_of(expected)
    one, other = (
        load_file(path / f"checkpoints/step-{STEPS}/weights.safetensors") for path in (found, expected)
    )
    assert all(np.array_equal(one[key], other[key]) for key in one)


def samplers(service: Service) -> list[int]:
    """Return their number at the end of each step."""
    return [line.get("samplers", 0) for line in metrics_of(service.folder)]


def test_samplers_join_and_leave_with_their_nodes(
    start: Start, finished: Service, cluster: Nodes, brake: Path
) -> None:
    cluster.add(num_gpus=1)
    wide = ["--rollout.workers", "3", "--rollout.min_workers", "1", "--rollout.gpus", "1"]
    service = start("elastic", *wide, "--cluster.address", cluster.address, "--cluster.deadline", "60")
    service.wait_for_step(3)
    brake.touch()  # the samplers that join need some time, on a busy machine more than all steps
    added = [cluster.add(num_gpus=1) for _ in range(2)]
    service.wait_until(lambda: samplers(service)[-1] == 3)
    brake.unlink()
    service.wait_for_step(len(samplers(service)) + 1)
    for node in added:
        cluster.kill(node)
    assert service.finish() == 0, service.output
    seen = samplers(service)[1:]
    print(f"\nsamplers after each step: {seen}")
    assert (seen[0], max(seen), seen[-1]) == (1, 3, 1)
    same_run(service.folder, finished.folder)


def test_the_learners_node_dies(start: Start, finished: Service, cluster: Nodes) -> None:
    first = cluster.add("learner")
    service = start(
        "moved", "--cluster.address", cluster.address, "--cluster.nodes", '{"learner": "learner"}'
    )
    service.wait_for_step(EVERY + 2)
    cluster.add("learner")
    cluster.kill(first)
    assert service.finish() == 0, service.output
    assert f"all ranks restart from step {EVERY}" in service.output
    same_run(service.folder, finished.folder)


def test_the_head_dies_and_the_next_attempt_continues(start: Start, finished: Service) -> None:
    flags: list[Any] = ["beheaded", "--auto-resume"]
    with nodes() as cluster:
        service = start(*flags, "--cluster.address", cluster.address)
        service.wait_for_step(EVERY + 2)
        for process in cluster.processes():
            process.kill()
        assert service.finish(120) != 0
    with nodes() as cluster:
        again = start(*flags, "--cluster.address", cluster.address)
        assert again.finish() == 0, again.output
    same_run(again.folder, finished.folder)
