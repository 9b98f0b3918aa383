"""The bundled task while a random sampler or reward replica is killed or stopped every 30 seconds."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.service_process import Service, ledger_of, metrics_of, role_of, services, timeless

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, EVERY_SECONDS, SLOWER = 60, 30.0, 1.8
FLAGS = [
    "--steps", str(STEPS), "--eval_every", str(STEPS), "--cluster.deadline", "5",
    "--rewards", '[{"name": "shapes", "deadline": 5}]',
]  # fmt: skip

Start = Callable[[str], Service]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    home = tmp_path_factory.mktemp("chaos")
    with services() as started:
        yield lambda name: started(["shapes", *FLAGS, "--folder", str(home / name)], home / name)


@pytest.fixture(scope="module")
def peaceful(start: Start) -> tuple[Service, float]:
    """The undisturbed run, and its seconds."""
    began = time.monotonic()
    service = start("peaceful")
    assert service.finish() == 0, service.output
    return service, time.monotonic() - began


def disturb(service: Service, chance: random.Random) -> list[str]:
    """Kill or stop a process regularly until the run ends; return the actions."""
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
def test_chaos_costs_time_and_nothing_else(start: Start, peaceful: tuple[Service, float], seed: int) -> None:
    expected, peace = peaceful
    began = time.monotonic()
    service = start(f"harried-{seed}")
    done = disturb(service, random.Random(seed))
    assert service.finish() == 0, service.output
    chaos = time.monotonic() - began
    print(f"\nseed {seed}: {peace:.0f} s in peace, {chaos:.0f} s ({chaos / peace:.2f} times) with {done}")
    assert done
    assert metrics_of(service.folder)[-1]["step"] == STEPS
    assert ledger_of(service.folder) == ledger_of(expected.folder)
    assert timeless(service.folder) == timeless(expected.folder)
    assert chaos <= SLOWER * peace
