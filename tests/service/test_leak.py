"""Hundreds of steps: constant object store, file descriptors and memory of the driver."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import psutil
import pytest
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from tests.support.ray_nodes import nodes
from tests.support.service_process import metrics_of, prepare, services

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, SETTLED = 500, 50
FLAGS = f"""
--steps {STEPS} --groups_per_step 2 --selection.candidates 4 --selection.keep 2 --eval_every {STEPS}
--eval_samples 1 --image_every {STEPS} --checkpoint_every {STEPS} --rollout.steps 2 --rollout.eval_steps 2
--rollout.workers 1 --learner.threads 1 --max_staleness 1 --max_empty_batches {STEPS}
""".split()


def test_five_hundred_steps_leave_nothing_behind(tmp_path: Path, pipeline_folder: Path) -> None:
    folder = tmp_path / "run"
    samples: list[tuple[int, float, int, float]] = []
    with nodes() as cluster, services() as start:
        state = get_state_from_address(cluster.address)
        inputs = prepare(tmp_path, pipeline_folder)
        service = start(
            ["shapes", *FLAGS, *inputs, "--folder", str(folder), "--cluster.address", cluster.address], folder
        )
        driver = psutil.Process(service.process.pid)
        service.wait_for_step(1)
        while service.process.poll() is None:
            time.sleep(1)
            step = metrics_of(folder)[-1]["step"]
            if step < STEPS:
                store = get_memory_info_reply(state).store_stats.object_store_bytes_used / 1e6
                samples.append((step, driver.memory_info().rss / 1e6, driver.num_fds(), store))
        assert service.finish() == 0, service.output
    early = [sample for sample in samples if SETTLED <= sample[0] < 3 * SETTLED]
    late = [sample for sample in samples if sample[0] >= STEPS - 2 * SETTLED]
    memory, descriptors, store = (
        (median(s[i] for s in early), median(s[i] for s in late)) for i in (1, 2, 3)
    )
    print(f"\nsteps 50-150 and 400-500: memory {memory} MB, descriptors {descriptors}, store {store} MB")
    assert len(early) > 3
    assert len(late) > 3
    assert memory[1] < memory[0] + 10
    assert descriptors[1] <= descriptors[0] + 2
    assert store[1] < store[0] + 5
