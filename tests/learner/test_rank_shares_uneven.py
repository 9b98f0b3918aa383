"""Ranks with unequal work: every trajectory weighs the same, whoever trains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from learner.rank_shares import Assignment, RankUpdate
from rollout.weights import flatten
from tests.support.ranks import in_world
from tests.support.tiny_learner import (
    Batch,
    learner_settings,
    member,
    model_settings,
    rollout_settings,
    sample,
    update,
)

TOTAL, FIRST = 20, 7


@dataclass(frozen=True)
class Gradient:
    """The gradient of one update over the first 7 and the other 13 trajectories, as rank 0 applies it."""

    folder: Path
    batch: Batch

    def __call__(self, rank: int, world: int, port: int) -> NDArray[np.float32]:
        learner = learner_settings(zero_stage=0, max_grad_norm=1e9, micro_batch=4)
        worker = member(model_settings(self.folder), rollout_settings(), learner, rank, world, port)
        seen: list[NDArray[np.float32]] = []
        worker.engine.basic_optimizer.register_step_pre_hook(
            lambda *_: seen.append(flatten(p.grad for _, p in worker.parameters))
        )
        update(worker, *self._call(rank, world))
        return seen[0]

    def _call(self, rank: int, world: int) -> tuple[RankUpdate]:
        items = [
            Assignment(trajectory=i, group_id=k.group_id, seed=i, advantage=k.advantage, weight=1 / TOTAL)
            for i, k in enumerate(self.batch.kept)
        ]
        shares = [items] if world == 1 else [items[:FIRST], items[FIRST:]]
        padding = [Assignment(trajectory=0, group_id=items[0].group_id, seed=0, advantage=0.0, weight=0.0)]
        mine = shares[rank] + padding * (max(map(len, shares)) - len(shares[rank]))
        kept = {number: self.batch.kept[number] for number in sorted({item.trajectory for item in mine})}
        owners = {k.group_id for k in kept.values()}
        work = RankUpdate(
            shares=[mine],
            conditionings={group: self.batch.conditionings[group] for group in owners},
            trajectories={n: self.batch.trajectories[k.group_id, k.candidate] for n, k in kept.items()},
        )
        return (work,)


def test_seven_and_thirteen_trajectories_are_twenty(pipeline_folder: Path) -> None:
    whole = sample(model_settings(pipeline_folder), rollout_settings(), candidates=11)
    batch = Batch(whole.kept[:TOTAL], whole.conditionings, whole.trajectories)
    task = Gradient(pipeline_folder, batch)
    ((alone,),) = in_world(1, [task])
    ((first, second),) = in_world(2, [task])
    assert np.array_equal(first, second)
    assert np.abs(alone).max() > 1e-3
    assert np.abs(first - alone).max() < 1e-6
