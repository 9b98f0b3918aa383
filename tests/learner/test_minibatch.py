"""The transitions of a share: states, weights and advantages."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from learner.minibatch import Transitions, TransitionTable, transitions
from learner.rank_shares import Assignment
from rollout.families.registry import Schedule
from rollout.records import Conditioning, Trajectory
from rollout.tensors import pack
from rollout.tools.model_costs import Counter

STEPS = 3
SCHEDULE = Schedule(torch.linspace(1, 0, 7), torch.linspace(1000, 167, 6))


def trajectory(number: int) -> Trajectory:
    """States (S + 1, 1, 2) that name their trajectory and step: 10 n + s."""
    states = np.stack([np.full((1, 2), 10 * number + s, dtype=np.float16) for s in range(STEPS + 1)])
    log_probs = np.array([number + s / 10 for s in range(STEPS)], dtype=np.float32)
    return Trajectory(states=states, log_probs=log_probs, steps=np.arange(2, 2 + STEPS))


def item(number: int, group: int, advantage: float, weight: float) -> Assignment:
    return Assignment(trajectory=number, group_id=group, seed=number, advantage=advantage, weight=weight)


SHARE = [item(4, 9, 7.0, 0.3), item(0, 2, -1.5, 0.6), item(2, 9, -7.0, 0.0)]


@pytest.fixture
def table() -> TransitionTable:
    conditionings = {
        group: Conditioning(arrays={"hidden": np.full((2, 3), group, np.float32), "pooled": np.ones(4)})
        for group in (2, 5, 9)
    }
    every = {i: trajectory(i) for i in range(5)}
    return transitions(SHARE, every, conditionings, SCHEDULE, size=100, advantage_clip=5.0)


@pytest.fixture
def rows(table: TransitionTable) -> Transitions:
    (rows,) = table
    return rows


def test_a_row_is_a_state_and_the_next(rows: Transitions) -> None:
    assert rows.states.dtype == torch.float32
    assert rows.states[:, 0, 0].tolist() == [40, 41, 42, 0, 1, 2, 20, 21, 22]
    assert torch.equal(rows.next_states, rows.states + 1)
    assert rows.steps.tolist() == [2, 3, 4] * 3
    assert rows.candidates.tolist() == [4] * 3 + [0] * 3 + [2] * 3
    assert torch.equal(rows.sigmas, SCHEDULE.sigmas[rows.steps])
    assert torch.equal(rows.next_sigmas, SCHEDULE.sigmas[rows.steps + 1])
    assert torch.equal(rows.timesteps, SCHEDULE.timesteps[rows.steps])
    assert rows.log_probs.tolist() == pytest.approx([4.0, 4.1, 4.2, 0.0, 0.1, 0.2, 2.0, 2.1, 2.2])


def test_advantages_are_cut_and_weights_spread_over_steps(rows: Transitions) -> None:
    assert rows.advantages.tolist() == [5.0] * 3 + [-1.5] * 3 + [-5.0] * 3
    assert rows.weights.tolist() == pytest.approx([0.1] * 3 + [0.2] * 3 + [0.0] * 3)


def test_a_row_finds_the_prompt_of_its_group(rows: Transitions) -> None:
    assert rows.embeddings["hidden"].shape == (2, 2, 3)  # once per group that occurs
    assert rows.conditioning["hidden"].shape == (9, 2, 3)
    assert rows.conditioning["hidden"][:, 0, 0].tolist() == [9] * 3 + [2] * 3 + [9] * 3


@pytest.mark.parametrize("size", [1, 4, 9, 100])
def test_parts_are_the_rows_in_order(rows: Transitions, table: TransitionTable, size: int) -> None:
    parts = list(replace(table, size=size))
    assert all(len(part.steps) <= size for part in parts)
    assert len(parts) == -(-9 // size)
    for name in ("states", "next_states", "log_probs", "advantages", "weights", "steps", "groups", "sigmas"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(rows, name))
    joined = torch.cat([part.conditioning["hidden"] for part in parts])
    assert torch.equal(joined, rows.conditioning["hidden"])


def test_bfloat16_states_arrive_exactly() -> None:
    states = torch.tensor([1.5, -3.0, 0.0078125], dtype=torch.bfloat16).view(3, 1, 1)
    stored = Trajectory(
        states=pack(states), log_probs=np.zeros(2, np.float32), steps=np.arange(2, dtype=np.int64)
    )
    conditioning = {1: Conditioning(arrays={"hidden": pack(states)})}
    (found,) = transitions([item(0, 1, 1.0, 1.0)], {0: stored}, conditioning, SCHEDULE, size=2)
    assert found.states.flatten().tolist() == [1.5, -3.0]
    assert found.next_states.flatten().tolist() == [-3.0, 0.0078125]
    assert found.embeddings["hidden"].dtype == torch.bfloat16


def test_a_share_of_videos_takes_little_of_the_device() -> None:
    """192 trajectories of Wan, 81 frames of 480 x 832: only a mini-batch is on the device, in float32."""
    steps, shape = 9, (16, 21, 60, 104)
    states = np.broadcast_to(np.float16(0), (steps + 1, *shape))
    one = Trajectory(states=states, log_probs=np.zeros(steps, np.float32), steps=np.arange(steps))
    hidden = Conditioning(arrays={"hidden": np.zeros((512, 4096), np.float16)})
    share = [item(i, i // 4, 1.0, 1 / 192) for i in range(192)]
    with torch.device("meta"):
        schedule = Schedule(torch.empty(11), torch.empty(10))
    module = torch.nn.Module()
    with Counter(module) as live:
        of_candidates, of_groups = dict.fromkeys(range(192), one), dict.fromkeys(range(48), hidden)
        table = transitions(share, of_candidates, of_groups, schedule, size=1)
        for part in islice(table, 20):
            assert part.states.is_meta
    assert 2 * 4 * np.prod(shape) < live.peak < 1e9
