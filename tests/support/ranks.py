"""Learners in worlds of several ranks: what each process does, and how a test starts them."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learner.records import Written
from learner.settings import LearnerSettings
from learner.worker import LearnerWorker
from rollout.settings import ModelSettings
from tests.support.ports import free_port
from tests.support.tiny_learner import (
    Batch,
    learner_settings,
    member,
    model_settings,
    rollout_settings,
    timeless,
    update,
    weights,
)

SAVED = 3


@dataclass(frozen=True)
class Case:
    """One way of training."""

    stage: int
    dtype: str = "float32"
    lora: int = 0
    offload: str = "none"
    beta: float = 0.0
    objective: str = "flow_grpo"

    def __str__(self) -> str:
        kind = f"lora{self.lora}" if self.lora else "full"
        plain = f"zero{self.stage}-{self.dtype}-{kind}-{self.offload}-beta{self.beta:g}"
        return plain if self.objective == "flow_grpo" else f"{plain}-{self.objective}"

    def model(self, folder: Path) -> ModelSettings:
        return model_settings(folder, dtype=self.dtype, lora_rank=self.lora)

    def learner(self, world: int) -> LearnerSettings:
        """A range of ratios so wide that the loss moves all the time."""
        return learner_settings(
            ranks=world, zero_stage=self.stage, offload=self.offload, learning_rate=1e-3,
            micro_batch=8, bucket_mb=1, ema_every=2, objective=self.section,
        )  # fmt: skip

    @property
    def section(self) -> dict[str, Any]:
        """The keys of the objective; the behaviour policy lags where it can."""
        if self.objective == "flow_grpo":
            return {"clip": 0.5, "beta": self.beta}
        lags = self.objective != "dpo"
        lagging = {"behaviour_decay": 0.5, "behaviour_ramp": 0.1} if lags else {}
        return {"name": self.objective, "kl_weight": self.beta, **lagging}


@dataclass(frozen=True)
class Life:
    """What a rank saw: metrics of every update, its weights and average at the end (rank 0 only)."""

    metrics: list[dict[str, float]]
    weights: NDArray[np.float32]
    average: NDArray[np.float32]
    broken: dict[str, Any]
    written: Written | None

    @property
    def losses(self) -> list[float]:
        return [one["loss"] for one in self.metrics]


@dataclass(frozen=True)
class Task:
    """Trains a case for some updates; from the start with a save on the way, or from such a save."""

    case: Case
    folder: Path
    batch: Batch
    updates: int
    save: Path | None = None
    resume: Path | None = None

    def __call__(self, rank: int, world: int, port: int) -> Life:
        model, learner = self.case.model(self.folder), self.case.learner(world)
        worker = member(model, rollout_settings(), learner, rank, world, port)
        start = 0
        if self.resume is not None:
            worker.restore(str(self.resume))
            start = SAVED
        metrics, written = [], None
        for done in range(start, self.updates):
            metrics.append(timeless(update(worker, *self._call(worker, rank, world))))
            if self.save is not None and done + 1 == SAVED:
                worker.save(str(self.save))
                written = worker.saved(wait=True)
        found = weights(worker), weights(worker, averaged=True)
        return Life(metrics, *found, self._break(worker, rank, world), written)

    def _call(self, worker: LearnerWorker, rank: int, world: int) -> tuple[Any]:
        return self.batch.calls(ranks=world, objective=worker.objective)[rank]

    def _break(self, worker: LearnerWorker, rank: int, world: int) -> dict[str, Any]:
        """An update in which the last rank's loss is finite and its gradient is not: a square root at 0."""
        before, counted = weights(worker), worker.ping()
        head = worker.policy.transformer.proj_out
        hook = head.register_forward_hook(lambda _module, _inputs, out: out + (0 * out).abs().sqrt())
        if rank < world - 1:
            hook.remove()
        metrics = update(worker, *self._call(worker, rank, world))
        hook.remove()
        held = weights(worker)  # collective, so on every rank
        unchanged = np.array_equal(before, held) and worker.ping() == counted
        after = update(worker, *self._call(worker, rank, world))
        now = weights(worker)
        moved = rank > 0 or not np.array_equal(before, now)
        finite = bool(np.isfinite(now).all() and np.isfinite(after["grad_norm"]))
        return {
            "metrics": metrics, "after": after, "unchanged": unchanged, "went on": moved and finite,
            "named": self._overdo(worker, rank, world),
        }  # fmt: skip

    def _overdo(self, worker: LearnerWorker, rank: int, world: int) -> list[tuple[str, ...]]:
        """The broken parameters after an update as usual, and after one with an infinite learning rate."""
        call = self._call(worker, rank, world)
        fine = worker.update(*call).broken
        for group in worker.engine.basic_optimizer.param_groups:
            group["lr"] = math.inf
        return [fine, worker.update(*call).broken]


def _work(rank: int, world: int, port: int, tasks: Sequence[Callable[[int, int, int], Any]]) -> list[Any]:
    return [task(rank, world, port) for task in tasks]


def in_world(world: int, tasks: Sequence[Callable[[int, int, int], Any]]) -> list[list[Any]]:
    """Do tasks one after another in processes of their own; returns, per task, what every rank saw."""
    port, context = free_port(), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "tests.support.ranks"])  # imported once, for all worlds
    with context.Pool(world) as pool:
        work = [(rank, world, port, tasks) for rank in range(world)]
        found = pool.starmap_async(_work, work, chunksize=1).get(timeout=900)
    return [list(lives) for lives in zip(*found, strict=True)]


def resumed(task: Task, source: Path) -> Task:
    return replace(task, save=None, resume=source)
