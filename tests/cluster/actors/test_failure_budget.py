"""The failure budget: broken rewards, and occasional failures."""

from __future__ import annotations

import pytest

from cluster.actors.failure_budget import FailureBudget
from rollout.records import Prompt


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(budget: FailureBudget, clock: Clock, seconds: float | None = None, restart: float = 0.0) -> bool:
    """Fail a call after a restart; without ``seconds`` it hangs until its deadline."""
    clock.now += restart
    allowed = budget.begin()
    clock.now += allowed if seconds is None else min(seconds, allowed)
    return budget.failed()


@pytest.mark.parametrize("restart", [0.0, 1.0, 3.0])
def test_a_reward_that_always_hangs_is_broken_within_two_deadlines(clock: Clock, restart: float) -> None:
    budget = FailureBudget(10.0, attempts=3, clock=clock)
    assert not fail(budget, clock)
    assert fail(budget, clock, restart=restart)
    assert clock.now - 100 < 20


def test_a_slow_start_never_takes_half_a_deadline_from_the_second_call(clock: Clock) -> None:
    budget = FailureBudget(10.0, attempts=3, clock=clock)
    assert not fail(budget, clock)
    clock.now += 60
    assert budget.begin() == 5.0
    budget.succeeded()
    assert budget.begin() == 10.0


@pytest.mark.parametrize("seconds", [0.0, 0.5, 2.0, 3.9, 7.0, 9.9])
def test_a_reward_that_always_raises_is_broken_within_two_deadlines(clock: Clock, seconds: float) -> None:
    budget = FailureBudget(10.0, attempts=3, clock=clock)
    while not fail(budget, clock, seconds):
        assert budget.failures < 10
    assert clock.now - 100 < 20


def test_one_slow_call_breaks_nothing(clock: Clock) -> None:
    budget = FailureBudget(10.0, attempts=3, clock=clock)
    for _ in range(50):
        assert not fail(budget, clock, restart=2.0)
        budget.begin()
        budget.succeeded()


def test_a_reward_that_worked_gets_more_patience_but_not_forever(clock: Clock) -> None:
    budget = FailureBudget(10.0, attempts=3, clock=clock)
    budget.begin()
    budget.succeeded()
    hung = [fail(budget, clock) for _ in range(5)]
    assert hung[:4] == [False] * 4
    assert hung[4]
    assert clock.now - 100 <= 60


def test_time_without_work_is_no_budget(clock: Clock) -> None:
    budget = FailureBudget(10.0, attempts=3, clock=clock)
    budget.begin()
    budget.succeeded()
    clock.now += 1000
    assert not fail(budget, clock)
    assert not fail(budget, clock)


def test_a_reward_whose_server_is_away_is_given_time_and_not_calls(clock: Clock) -> None:
    budget = FailureBudget(10.0, attempts=3, clock=clock)
    budget.begin()
    budget.succeeded()
    calls = 0
    budget.begin()
    while not budget.failed(away=True):
        clock.now += 0.25
        budget.begin()
        calls += 1
    assert calls > 100
    assert clock.now - 100 <= 60


def test_failures_of_one_prompt_do_not_break_a_reward_that_works(clock: Clock) -> None:
    budget = FailureBudget(10.0, attempts=3, clock=clock)
    budget.begin()
    budget.succeeded()
    bad, other = Prompt(index=1, text="bad"), Prompt(index=2, text="other")
    for _ in range(50):
        clock.now += budget.begin()
        assert not budget.failed([bad, other])
        clock.now += budget.begin()
        assert not budget.failed([bad])
    began = clock.now
    clock.now += budget.begin()
    assert not budget.failed([other])
    while not budget.failed([bad]):
        clock.now += budget.begin()
    assert 0 < clock.now - began <= 60


def test_failures_of_one_prompt_break_a_reward_that_never_worked(clock: Clock) -> None:
    budget = FailureBudget(10.0, attempts=3, clock=clock)
    clock.now += budget.begin()
    assert not budget.failed([Prompt(index=1, text="")])
    clock.now += budget.begin()
    assert budget.failed([Prompt(index=1, text="")])
