"""Tests of the division of candidates into forward passes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout.batches import batches
from rollout.noise import candidate_noises
from rollout.records import Prompt, SampleRequest
from rollout.settings import RolloutSettings


def asked(counts: list[int]) -> list[SampleRequest]:
    return [
        SampleRequest(
            group_id=group,
            prompt=Prompt(index=group % 2, text=f"prompt {group % 2}"),
            noises=candidate_noises(0, group % 2, group, count),
            version=3,
        )
        for group, count in enumerate(counts)
    ]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 20))
def test_every_candidate_is_in_one_batch_in_order_and_only_the_last_is_not_full(
    counts: list[int], size: int
) -> None:
    requests = asked(counts)
    made = batches(requests, RolloutSettings(batch=size))
    found = [(part.group_id, part.prompt, noise) for batch in made for part in batch for noise in part.noises]
    assert found == [(one.group_id, one.prompt, noise) for one in requests for noise in one.noises]
    filled = [sum(len(part.noises) for part in batch) for batch in made]
    assert all(full == size for full in filled[:-1])
    assert filled[-1] <= size
    assert all(part.version == 3 and part.noises for batch in made for part in batch)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 20))
def test_groups_whose_windows_may_differ_keep_their_batches(counts: list[int], size: int) -> None:
    drawn = RolloutSettings(batch=size, window_size=2)
    made = batches(asked(counts), drawn)
    assert all(len(batch) == 1 for batch in made)
    assert len(made) == sum(-(-count // size) for count in counts)
