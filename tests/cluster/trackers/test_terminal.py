"""Progress in a terminal of 80 columns, and the messages of a start."""

from __future__ import annotations

import asyncio
import io
import re
from typing import Any

import pytest
from rich.console import Console

from cluster.actors.pool import Pool
from cluster.actors.stages import RayStages
from cluster.trackers import waiting as starting
from cluster.trackers.display import Display
from cluster.trackers.waiting import Waiting
from tests.support.step_metrics import EVALUATED, METRICS

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HALF = {**METRICS, "step": 500}
LONG = {**METRICS, "step": 998, "reward_mean": -10.5, "seconds_step": 123.4}


def in_terminal(width: int) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=width, color_system=None), stream


def lines(stream: io.StringIO) -> list[str]:
    """Return the lines of every frame that was drawn."""
    return CONTROL.sub("", stream.getvalue()).replace("\r", "\n").splitlines()


def last_frame(width: int, *steps: dict[str, Any], total: int = 1000) -> str:
    console, stream = in_terminal(width)
    with Display(console, steps=total, start=0) as display:
        for step in steps:
            display.step(step)
    assert max(map(len, lines(stream))) <= width
    return lines(stream)[-1]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("step", [HALF, {**EVALUATED, "step": 500}, LONG], ids=["short", "evaluated", "long"])
def test_bar_steps_time_left_and_numbers_are_whole(width: int, step: dict[str, Any]) -> None:
    frame = last_frame(width, {**METRICS, "step": 1}, step)
    assert re.match(rf"training ━+[╸╺]?━*\s+{step['step']}/1000 (\d+|-):(\d\d|--):(\d\d|--) reward", frame)
    assert f"reward {step['reward_mean']:.3f}" in frame
    assert "margin 0.250" in frame
    assert f"{step['seconds_step']:.1f} s" in frame
    assert "…" not in frame
    assert ("broadcast 0.1" in frame) == (width == 200)
    assert ("learn 1.6" in frame) == (width >= 100)


def test_a_narrow_terminal_loses_numbers_before_bar_and_time() -> None:
    frame = last_frame(60, {**METRICS, "step": 1}, LONG)
    assert re.match(r"training ━+╸?\s+998/1000 \d+:\d\d:\d\d reward -10.5.*…", frame)


def test_time_is_left_where_a_step_takes_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = in_terminal(80)
    display = Display(console, steps=10, start=0)
    now = 0.0
    monkeypatch.setattr(display.progress, "get_time", lambda: now)
    with display:
        for step in range(1, 5):
            now += 300
            display.step({**METRICS, "step": step})
    assert "4/10 0:30:00 reward" in lines(stream)[-1]


class FakePool(Pool):
    """A pool that counts actors without any."""

    def __init__(self, up: int, count: int) -> None:
        self.slots = [type("Slot", (), {"started": number < up})() for number in range(count)]


def stages(samplers: int = 1, reward: int = 0, selector: int = 0, parts: int = 0) -> Any:
    def holder(pool: FakePool, **more: Any) -> Any:
        return type("Holder", (), {"pool": pool, **more})()

    rewards = type("Rewards", (), {"replicas": {"shapes": holder(FakePool(reward, 1))}})()
    learner = type("Learner", (), {"parts": parts})()
    return RayStages(
        holder(FakePool(samplers, 2)), rewards, holder(FakePool(selector, 1)), learner, None
    )  # fmt: skip


def test_a_start_says_who_is_missing() -> None:
    assert stages().missing == "samplers 1 of 2, reward shapes, selector, learner"
    assert stages(samplers=2, reward=1, selector=1).missing == "learner"
    assert stages(samplers=0, reward=1, selector=1, parts=3).missing == "samplers 0 of 2"
    assert not stages(samplers=2, reward=1, selector=1, parts=3).missing


def wait(console: Console) -> None:
    left = ["learner", "samplers 1 of 2, learner", "samplers 0 of 2, learner"]

    async def work() -> None:
        while len(left) > 1:
            await asyncio.sleep(0.3)
            left.pop()
        await asyncio.sleep(0.3)

    async def start() -> None:
        with Waiting(console).shown("starting the actors") as waiting:
            await waiting.until(work(), lambda: f"starting: {left[-1]}")

    asyncio.run(start())


def test_a_terminal_shows_live_what_a_start_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "POLL", 0.01)
    console, stream = in_terminal(80)
    wait(console)
    shown = "\n".join(lines(stream))
    for story in ("samplers 0 of 2, learner", "samplers 1 of 2, learner", "learner"):
        assert f" starting: {story}\n" in shown


def test_elsewhere_a_start_is_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    wait(Console(file=stream, width=80))
    assert stream.getvalue() == "starting the actors (0 s)\n"
    monkeypatch.setattr(starting, "POLL", 0.01)
    monkeypatch.setattr(starting, "EVERY", 0.35)
    wait(Console(file=stream, width=80))
    assert 3 <= len(stream.getvalue().splitlines()) <= 6
    assert re.search(r"starting: (samplers 1 of 2, )?learner \(0 s\)", stream.getvalue())


def test_a_start_that_fails_fails_with_its_error() -> None:
    async def work() -> None:
        raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        asyncio.run(Waiting(in_terminal(80)[0]).until(work(), lambda: "starting"))
