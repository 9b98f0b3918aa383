"""The reward stage on real actor processes: failures, deadlines, replicas, and broken images."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.actors.pool import Slot
from cluster.actors.rewards import Rewards
from cluster.config.errors import PoolError
from rewards.combine import Scores
from rollout.records import Chunk, Prompt

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("node")]

HERE = "tests.support.scorers"
PROMPT = Prompt(index=0, text="a photo of a circle")
BROKEN = 9


@pytest.fixture
def make(configure: Any) -> Any:
    """The reward stage of a configuration with these rewards."""

    def build(*listed: dict[str, Any], **keys: Any) -> Rewards:
        named = [{**reward, "name": f"{HERE}:{reward['name']}"} for reward in listed]
        settings = configure()
        return Rewards(settings.model_validate({**settings.model_dump(), "rewards": named, **keys}))

    return build


def chunk_of(values: Sequence[int]) -> Chunk:
    images = np.array(values, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    return Chunk(
        images=ray.put(images), finite=finite_of(values), conditioning=None,
        trajectories=(None,) * len(values), seconds=0.0,
    )  # fmt: skip


def finite_of(values: Sequence[int]) -> tuple[bool, ...]:
    """Images of the value `BROKEN` are not finite."""
    return tuple(value != BROKEN for value in values)


async def sampled(values: Sequence[int], after: float = 0.0) -> Chunk:
    await asyncio.sleep(after)
    return chunk_of(values)


async def score(rewards: Rewards, *chunks: Sequence[int]) -> Scores:
    for replicas in rewards.replicas.values():
        await replicas.pool.ready()
    return await rewards.score(PROMPT, [sampled(values) for values in chunks])


def test_a_failed_reward_is_missing_and_never_zero(make: Any) -> None:
    rewards = make({"name": "Scorer"}, {"name": "BrokenScorer", "weight": 0.5})
    scores = asyncio.run(score(rewards, [3, 5], [7]))
    assert scores.rewards[f"{HERE}:Scorer"].tolist() == [3, 5, 7]
    assert np.isnan(scores.rewards[f"{HERE}:BrokenScorer"]).all()
    assert np.isnan(scores.total).all()
    assert not scores.valid.any()
    assert "the detector is out of order" in rewards.failures[0]


def test_a_failed_reward_of_no_weight_costs_nothing(make: Any) -> None:
    rewards = make({"name": "Scorer"}, {"name": "BrokenScorer", "weight": 0, "attempts": 2})
    scores = asyncio.run(score(rewards, [3, 5]))
    assert scores.total.tolist() == [3, 5]
    assert scores.valid.all()
    assert np.isnan(scores.rewards[f"{HERE}:BrokenScorer"]).all()
    assert "failed 2 times" in rewards.replicas[f"{HERE}:BrokenScorer"].failure
    assert not rewards.failures  # of what training needs


def test_a_broken_reward_of_no_weight_rests_and_ends_nothing(make: Any) -> None:
    rewards = make({"name": "Scorer"}, {"name": "BrokenScorer", "weight": 0, "attempts": 1})

    async def scenario() -> None:
        await asyncio.gather(*(pool.ready() for pool in rewards.pools))
        for _ in range(12):  # more failures in a row than are a coincidence
            assert (await rewards.score(PROMPT, [sampled([3, 5])])).total.tolist() == [3, 5]

    asyncio.run(scenario())
    ((metric, story),) = rewards.alarms().items()
    assert metric == f"eval_{HERE}:BrokenScorer"
    assert "8 calls in" in story
    assert "the detector is out of order" in story


def test_a_hung_reward_of_no_weight_is_given_two_deadlines_and_works_again_later(
    make: Any, tmp_path: Path
) -> None:
    slow = {"name": "SlowScorer", "weight": 0, "deadline": 1, "options": {"hang_while": str(tmp_path / "on")}}
    (tmp_path / "on").touch()
    rewards = make({"name": "Scorer"}, slow)

    async def scored() -> list[float]:
        scores = await rewards.score(PROMPT, [sampled([3, 5])])
        assert scores.total.tolist() == [3, 5]
        return list(scores.rewards[f"{HERE}:SlowScorer"])

    async def scenario() -> None:
        await asyncio.gather(*(pool.ready() for pool in rewards.pools))
        for _ in range(3):
            assert np.isnan(await scored()).all()
        (story,) = rewards.alarms().values()
        assert "2 calls in" in story
        assert "TimeoutError" in story
        (tmp_path / "on").unlink()
        assert np.isnan(await scored()).all()
        rewards.retry_paused()
        assert await scored() == [3, 5]

    asyncio.run(scenario())


def test_images_that_are_not_finite_are_missing_for_every_reward_and_never_judged(make: Any) -> None:
    rewards = make(
        {"name": "CountingScorer", "batch": 2},
        {"name": "WholeGroupScorer", "weight": 0.5},
        {"name": "Scorer", "weight": 0},
    )
    scores = asyncio.run(score(rewards, [1, BROKEN, 2, 3], [BROKEN, BROKEN], [4]))
    by_name = {name.removeprefix(f"{HERE}:"): values.tolist() for name, values in scores.rewards.items()}
    nan = pytest.approx(np.nan, nan_ok=True)
    assert by_name["CountingScorer"] == [1, nan, 2, 2, nan, nan, 1]  # which is the size of the call
    assert by_name["WholeGroupScorer"] == [4, nan, 4, 4, nan, nan, 4]
    assert by_name["Scorer"] == [1, nan, 2, 3, nan, nan, 4]
    assert scores.valid.tolist() == [True, False, True, True, False, False, True]
    assert not rewards.failures


def test_held_out_images_that_are_not_finite_are_missing(make: Any) -> None:
    rewards = make({"name": "Scorer"})

    async def scenario(*values: int) -> list[float]:
        await rewards.pools[0].ready()
        images = await chunk_of(values).images
        scores = await rewards.score_held_out(ray.put(images), [PROMPT] * len(values), finite_of(values))
        return list(scores.total)

    nan = pytest.approx(np.nan, nan_ok=True)
    assert asyncio.run(scenario(BROKEN, 1, BROKEN, 5)) == [nan, 1, nan, 5]
    assert asyncio.run(scenario(BROKEN)) == [nan]


def test_rewards_are_standardised_where_that_is_asked_for(make: Any) -> None:
    rewards = make({"name": "Scorer"}, {"name": "CountingScorer", "batch": 2}, combine="standardised")
    scores = asyncio.run(score(rewards, [1, 3, 5]))
    np.testing.assert_allclose(scores.total, [-1.2247 + 0.7071, 0.7071, 1.2247 - 1.4142], atol=1e-3)
    assert scores.rewards[f"{HERE}:CountingScorer"].tolist() == [2, 2, 1]


def test_calls_are_cut_to_the_batch_except_for_groups_that_are_judged_as_one(make: Any) -> None:
    rewards = make({"name": "CountingScorer", "batch": 2, "workers": 2}, {"name": "WholeGroupScorer"})
    scores = asyncio.run(score(rewards, [1, 1, 0], [1]))
    by_name = {name.removeprefix(f"{HERE}:"): values for name, values in scores.rewards.items()}
    np.testing.assert_array_equal(by_name["CountingScorer"], [2, 2, np.nan, 1])
    np.testing.assert_array_equal(by_name["WholeGroupScorer"], [4, 4, np.nan, 4])
    assert scores.valid.tolist() == [True, True, False, True]


def test_a_chunk_is_scored_while_the_next_one_is_sampled(make: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    rewards = make({"name": "SlowScorer", "options": {"seconds": 0.1, "log": str(log)}})

    async def scenario() -> tuple[Scores, float]:
        await rewards.replicas[f"{HERE}:SlowScorer"].pool.ready()
        last = asyncio.ensure_future(sampled([4], after=2.0))
        scores = await rewards.score(PROMPT, [sampled([1, 2, 3]), last])
        return scores, time.time()

    scores, done = asyncio.run(scenario())
    assert scores.total.tolist() == [1, 2, 3, 4]
    first = float(log.read_text().split()[2])
    assert done - first > 1.0


def test_two_replicas_work_at_the_same_time(make: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = {"seconds": 0.3, "log": str(log)}
    rewards = make({"name": "SlowScorer", "workers": 2, "batch": 2, "options": options})
    scores = asyncio.run(score(rewards, [1, 2, 3, 4]))
    assert scores.total.tolist() == [1, 2, 3, 4]
    calls = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for pid, _, _ in calls}) == 2
    assert max(float(began) for _, began, _ in calls) < min(float(done) for _, _, done in calls)


def test_work_of_a_replica_that_hangs_is_done_by_another_while_it_restarts(make: Any, tmp_path: Path) -> None:
    options = {"hang_once": str(tmp_path / "hung"), "start": 12.0}
    rewards = make({"name": "SlowScorer", "deadline": 4, "workers": 2, "batch": 2, "options": options})

    async def scenario() -> float:
        await rewards.pools[0].ready()
        began = time.perf_counter()
        scores = await rewards.score(PROMPT, [sampled([1, 2, 3, 4, 5, 6])])
        assert scores.total.tolist() == [1, 2, 3, 4, 5, 6]
        return time.perf_counter() - began

    assert asyncio.run(scenario()) < 12  # less than the start alone
    assert rewards.pools[0].restarts == 1
    assert not rewards.failures


def test_a_reward_past_its_deadline_is_missing(make: Any) -> None:
    rewards = make({"name": "HungScorer", "deadline": 0.5, "attempts": 1})
    scores = asyncio.run(score(rewards, [1, 2, 3]))
    assert np.isnan(scores.total).all()
    assert rewards.pools[0].restarts == 1
    assert "TimeoutError: score_ranges gave no answer in 0.5 s" in rewards.failures[0]


def time_to_break(rewards: Rewards, groups: int, error: str) -> float:
    """Measure the seconds from the first call until the stage fails with the reward's own error."""

    async def scenario() -> float:
        await asyncio.gather(*(pool.ready() for pool in rewards.pools))
        began = time.perf_counter()
        with pytest.raises(PoolError, match=error):
            await asyncio.gather(*(rewards.score(PROMPT, [sampled([1, 2])]) for _ in range(groups)))
        return time.perf_counter() - began

    return asyncio.run(scenario())


def test_a_reward_that_always_raises_stops_at_once(make: Any) -> None:
    rewards = make({"name": "BrokenScorer", "deadline": 20})
    error = r"BrokenScorer': 8 calls in . s and none succeeded: .*the detector is out of order"
    assert time_to_break(rewards, 8, error) < 10


def test_a_reward_that_always_hangs_stops_within_two_deadlines(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    async def timed(slot: Slot) -> None:
        began = time.perf_counter()
        await start(slot)
        starts.append(time.perf_counter() - began)

    start = Slot.start
    monkeypatch.setattr(Slot, "start", timed)
    rewards = make({"name": "HungScorer", "deadline": 8, "workers": 2})
    error = r"HungScorer': \d calls in \d+ s and none succeeded: TimeoutError: score_ranges gave no answer"
    seconds = time_to_break(rewards, 8, error)
    # On a machine so busy that a process takes seconds to start, the second call still gets half a deadline.
    assert seconds < max(16, 13 + max(starts))


def test_a_reward_that_cannot_be_made_stops_before_the_first_step(make: Any) -> None:
    rewards = make({"name": "UnbuildableScorer"})
    with pytest.raises(PoolError, match=r"could not be made: FileNotFoundError: detector\.bin is not there"):
        asyncio.run(rewards.pools[0].ready())
