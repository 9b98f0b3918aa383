"""Noised rows: their identity, their levels, and their division into mini-batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.noised import Noised, NoisedTable, interpolated, noised
from learner.rank_shares import Assignment, split_over_ranks
from rollout.families.registry import Schedule
from rollout.noise import forward_noise, forward_times
from rollout.records import Conditioning, Trajectory
from selection.records import Kept

STEPS = 5
SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.2, 0.0])
SCHEDULE = Schedule(SIGMAS, SIGMAS[:-1] * 1000)
SHAPE = (2, 3, 3)
SEED = 0


def trajectory(number: int) -> Trajectory:
    clean = np.random.default_rng(number).standard_normal(SHAPE).astype(np.float16)
    return Trajectory(steps=np.arange(0), clean=clean)


def assignment(number: int, **changes: Any) -> Assignment:
    made = Assignment(
        trajectory=number, group_id=number % 2, seed=SEED or 100 + number, advantage=float(number), weight=0.1
    )
    return replace(made, **changes)


def table(numbers: list[int], *, draws: int = 3, size: int = 100, **options: Any) -> NoisedTable:
    return noised(
        [assignment(n) for n in numbers],
        {n: trajectory(n) for n in numbers},
        {g: Conditioning(arrays={"hidden": np.full((2, 4), g, np.float32)}) for g in (0, 1)},
        SCHEDULE, draws=draws, size=size, **options,
    )  # fmt: skip


def joined(parts: list[Noised], name: str) -> torch.Tensor:
    return torch.cat([getattr(part, name) for part in parts])


COLUMNS = ("clean", "noise", "sigmas", "timesteps", "states", "target", "advantages", "steps", "candidates")


@given(st.integers(1, 13), st.integers(1, 4))
def test_the_size_of_mini_batches_changes_no_row(size: int, draws: int) -> None:
    numbers = [0, 1, 2, 3]
    whole, parts = list(table(numbers, draws=draws)), list(table(numbers, draws=draws, size=size))
    assert max(len(part.weights) for part in parts) == min(size, 4 * draws)
    for name in COLUMNS:
        assert torch.equal(joined(parts, name), joined(whole, name)), name
    assert torch.equal(
        torch.cat([part.conditioning["hidden"] for part in parts]), whole[0].conditioning["hidden"]
    )


def test_a_candidates_rows_do_not_depend_on_its_company() -> None:
    (alone,), (together,) = table([2]), table([0, 1, 2])
    for name in COLUMNS:
        assert torch.equal(getattr(alone, name), getattr(together, name)[6:9]), name


def test_rows_are_the_straight_path_through_a_candidate() -> None:
    (part,) = table([0, 1])
    assert part.clean.dtype == torch.float32
    assert np.array_equal(part.clean[0].numpy(), trajectory(0).clean.astype(np.float32))
    assert torch.allclose(part.states - part.levels * part.target, part.clean, atol=1e-6)
    assert torch.allclose(part.states + (1 - part.levels) * part.target, part.noise, atol=1e-6)
    assert part.advantages.tolist() == [0.0] * 3 + [1.0] * 3
    assert part.weights.tolist() == pytest.approx([0.1 / 3] * 6)


def test_advantages_are_clipped() -> None:
    (part,) = table([1, 3], advantage_clip=2.0, draws=1)
    assert part.advantages.tolist() == [1.0, 2.0]


def test_candidates_of_one_seed_share_noise_and_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.learner.test_noised.SEED", 7)
    (part,) = table([0, 1])
    assert torch.equal(part.noise[:3], part.noise[3:])
    assert torch.equal(part.sigmas[:3], part.sigmas[3:])
    assert not torch.equal(part.clean[:3], part.clean[3:])


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=8), st.integers(1, 9))
def test_draws_are_spread_over_the_whole_schedule(seeds: list[int], draws: int) -> None:
    times = np.array(forward_times(seeds, draws)).reshape(len(seeds), draws)
    assert ((times * draws).astype(int) == np.arange(draws)).all()
    assert forward_times(seeds[::-1], draws)[-draws:] == times[0].tolist()


def test_noise_levels_are_as_dense_as_the_schedules() -> None:
    many = 4000
    positions = torch.tensor(forward_times(list(range(many)), 1)) * STEPS
    levels = interpolated(SIGMAS, positions.float())
    shares = [((levels <= a) & (levels > b)).float().mean() for a, b in pairwise(SIGMAS)]
    assert torch.stack(shares).tolist() == pytest.approx([1 / STEPS] * STEPS, abs=0.03)


def test_steps_are_those_in_which_the_levels_lie() -> None:
    (part,) = table(list(range(6)), draws=4)
    assert (part.sigmas <= SIGMAS[part.steps]).all()
    assert (part.sigmas > SIGMAS[part.steps + 1]).all()
    assert part.timesteps.tolist() == pytest.approx((part.sigmas * 1000).tolist(), rel=1e-5)


@pytest.mark.parametrize("place", [0.0, 1 - 2**-63, 1 - 2**-20])
def test_the_ends_of_the_schedule(place: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.noised.forward_times", lambda seeds, draws: [place] * len(seeds))
    (part,) = table([0], draws=1)
    assert part.steps.item() in (0, STEPS - 1)
    assert 0 < part.sigmas.item() <= 1


def test_forward_noise_is_normal_and_its_own_stream() -> None:
    found = forward_noise([5, 6], 2, (2000,))
    assert found.shape == (4, 2000)
    assert found.mean().item() == pytest.approx(0, abs=0.05)
    assert found.std().item() == pytest.approx(1, abs=0.05)
    assert np.abs(np.corrcoef(found.numpy()) - np.eye(4)).max() < 0.1


def test_equal_seeds_have_the_rows_that_each_alone_has() -> None:
    found = forward_noise([5, 6, 5], 2, (3, 4))
    assert torch.equal(found, torch.cat([forward_noise([seed], 2, (3, 4)) for seed in (5, 6, 5)]))


def test_seeds_belong_to_the_candidate_and_the_step() -> None:
    kept = [Kept(group_id=g, candidate=c, advantage=1.0) for g in (3, 4) for c in (0, 2, 5, 7)]

    def seeds(chosen: list[Kept], *, ranks: int = 1, seed: int = 0, step: int = 0) -> dict[Any, int]:
        return {
            (chosen[one.trajectory].group_id, chosen[one.trajectory].candidate): one.seed
            for mine in split_over_ranks(chosen, ranks=ranks, updates=2, seed=seed, step=step)
            for share in mine
            for one in share
        }

    found = seeds(kept)
    assert len(set(found.values())) == len(kept)
    assert seeds(kept[::-1], ranks=3) == found
    assert not set(seeds(kept, step=1).values()) & set(found.values())
    assert not set(seeds(kept, seed=1).values()) & set(found.values())
