"""Learners of the tiny pipeline and batches for them, in this process or in spawned ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learner.objectives.base import Objective
from learner.rank_shares import RankUpdate, rank_updates
from learner.settings import LearnerSettings
from learner.worker import LearnerWorker
from rollout.noise import candidate_noises
from rollout.records import CandidateGroup, Conditioning, Keep, Prompt, SampleRequest, Trajectory, WeightsId
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tensors import unpack
from rollout.worker import RolloutWorker
from selection.records import Kept
from tests.support.ports import free_port

TEXTS = ("a photo of a red circle", "a photo of two crosses")
CANDIDATES = 4
HORIZON = 1000
KEPT: tuple[Keep, ...] = ("states", "log_probs")


@dataclass(frozen=True)
class Batch:
    """Seven kept candidates of two groups: an odd number, so that two ranks need padding."""

    kept: list[Kept]
    conditionings: dict[int, Conditioning]
    trajectories: dict[tuple[int, int], Trajectory]

    def calls(
        self, *, ranks: int = 1, updates: int = 2, objective: Objective | None = None
    ) -> list[tuple[RankUpdate]]:
        """The arguments of `LearnerWorker.update`, for every rank."""
        units = objective.units(self.kept) if objective else None
        groups = [
            CandidateGroup(
                group_id=group, prompt=Prompt(index=group, text=""), version=0, noises=(), images=(),
                conditioning=conditioning, seconds=0.0,
                trajectories=tuple(one for key, one in self.trajectories.items() if key[0] == group),
            )
            for group, conditioning in self.conditionings.items()
        ]  # fmt: skip
        return [
            (work,)
            for work in rank_updates(
                self.kept, groups, ranks=ranks, updates=updates, seed=0, step=0, units=units
            )
        ]


def rollout_settings(**changes: Any) -> RolloutSettings:
    values = {"width": 32, "height": 32, "steps": 4, "guidance": 1.0, "text_tokens": 0, "gpus": 0, "batch": 3}
    return RolloutSettings(**{**values, **changes})


def learner_settings(**changes: Any) -> LearnerSettings:
    values = {"gpus": 0, "learning_rate": 1e-4, "micro_batch": 100, "ema_every": 1}
    own: dict[str, Any] = {} if "objective" in changes else {"clip": 1e-3}  # as older files have it
    return LearnerSettings(**{**values, **own, **changes})


def model_settings(folder: Path, **changes: Any) -> ModelSettings:
    return ModelSettings(path=str(folder), **changes)


def sampler(
    model: ModelSettings, rollout: RolloutSettings, *, keeps: Collection[Keep] = KEPT
) -> RolloutWorker:
    return RolloutWorker(model, rollout, seed=0, keeps=keeps)


def sample(
    model: ModelSettings,
    rollout: RolloutSettings,
    *,
    keeps: Collection[Keep] = KEPT,
    candidates: int = CANDIDATES,
) -> Batch:
    """All candidates of two groups but the last one."""
    worker = sampler(model, rollout, keeps=keeps)
    conditionings, trajectories = {}, {}
    for group_id, text in enumerate(TEXTS):
        noises = candidate_noises(0, group_id, group_id, candidates)
        prompt = Prompt(index=group_id, text=text)
        request = SampleRequest(group_id=group_id, prompt=prompt, noises=noises, version=0)
        (chunk,) = worker.sample([request])
        conditionings[group_id] = chunk.conditioning
        trajectories |= {(group_id, i): trajectory for i, trajectory in enumerate(chunk.trajectories)}
    kept = [
        Kept(group_id=group, candidate=candidate, advantage=(-1) ** candidate * (0.5 + candidate + group))
        for group, candidate in list(trajectories)[:-1]
    ]
    return Batch(kept, conditionings, trajectories)


def start(model: ModelSettings, rollout: RolloutSettings, learner: LearnerSettings) -> LearnerWorker:
    """The only rank of its world; later workers of a process share the process group of the first."""
    return member(model, rollout, learner, 0, 1, free_port())


def member(
    model: ModelSettings, rollout: RolloutSettings, learner: LearnerSettings, rank: int, world: int, port: int
) -> LearnerWorker:
    """One rank of a world."""
    worker = LearnerWorker(model, rollout, learner, seed=0, horizon=HORIZON)
    worker.join(rank, world, "127.0.0.1", port)
    return worker


def update(worker: LearnerWorker, *call: Any) -> dict[str, float]:
    return dict(worker.update(*call).metrics)


def timeless(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "seconds_learn"}


def weights(worker: LearnerWorker, *, averaged: bool = False) -> NDArray[np.float32]:
    """All published values as float32; on ranks that publish nothing, none."""
    parts = [flat for _, flat in worker.publish(averaged)]
    return np.concatenate(
        [unpack(flat).float().numpy() for flat in parts if flat is not None] or [np.empty(0)]
    )


def moved(after: NDArray[np.float32], before: NDArray[np.float32]) -> float:
    """The largest change of any weight."""
    return float(np.abs(after - before).max())


def hand_over(worker: LearnerWorker, receiver: RolloutWorker, version: int) -> WeightsId | None:
    """Publish to a sampler, part by part; returns the weights it then holds."""
    count = worker.parts()
    held = [
        receiver.load(WeightsId(version), number, count, digest, flat)
        for number, (digest, flat) in enumerate(worker.publish())
    ]
    assert held[:-1] == [None] * (count - 1)
    return held[-1]
