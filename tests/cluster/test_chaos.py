"""The bundled task while a random sampler or reward shard is killed or stopped every 30 seconds."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.service import Service, ledger_of, metrics_of, role_of, services, timeless

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, EVERY_SECONDS, SLOWER = 60, 30.0, 1.8
FLAGS = [
    "--steps", str(STEPS), "--eval_every", str(STEPS), "--cluster.deadline", "5",
    "--rewards", '[{"name": "shapes", "deadline": 5}]',
]  # fmt: skip

Start = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with services() as started:
        yield lambda name, seed: started(
            ["shapes", *FLAGS, "--seed", str(seed), "--folder", str(tmp_path / name)], tmp_path / name
        )


def disturb(service: Service, chance: random.Random) -> list[str]:
    """Hurt one process every so often until the run ends; what was done."""
    done: list[str] = []
    due = time.monotonic() + EVERY_SECONDS
    while service.process.poll() is None:
        time.sleep(0.1)
        targets = [process for process in service.family() if role_of(process) in ("rollout", "shapes")]
        if time.monotonic() >= due and targets:
            due += EVERY_SECONDS
            number = chance.choice([signal.SIGKILL, signal.SIGSTOP])
            target = chance.choice(targets)
            done.append(f"{number.name} {role_of(target)}")
            target.send_signal(number)
    return done


@pytest.mark.parametrize("seed", range(3))
def test_chaos_costs_time_and_nothing_else(start: Start, seed: int) -> None:
    began = time.monotonic()
    peaceful = start("peaceful", seed)
    assert peaceful.finish() == 0, peaceful.output
    between = time.monotonic()
    harried = start("harried", seed)
    done = disturb(harried, random.Random(seed))
    assert harried.finish() == 0, harried.output
    peace, chaos = between - began, time.monotonic() - between
    print(f"\nseed {seed}: {peace:.0f} s in peace, {chaos:.0f} s ({chaos / peace:.2f} times) with {done}")
    assert done
    assert metrics_of(harried.folder)[-1]["step"] == STEPS
    assert ledger_of(harried.folder) == ledger_of(peaceful.folder)
    assert timeless(harried.folder) == timeless(peaceful.folder)
    assert chaos <= SLOWER * peace
