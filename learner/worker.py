"""The learner worker: one DeepSpeed rank that applies FlowGRPO updates. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from learner import checkpoint
from learner import engine as deepspeed_engine
from learner.checkpoint_upload import Storage
from learner.ema import Ema
from learner.finite_check import GradientGuard, not_finite
from learner.loss import (
    Objective,
    clipped_objective,
    flow_grpo_kl,
    gaussian_kl,
    guarded_log_ratio,
    weighted_objective,
)
from learner.metrics import UpdateMetrics
from learner.minibatch import Rows, rows_of
from learner.rank_shares import RankUpdate
from learner.records import Update, Written
from learner.reference import Reference
from learner.settings import LearnerSettings
from rollout.families.registry import load_policy
from rollout.sampler import transition
from rollout.sde import Transition, log_prob
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tensors import keep_freed_memory
from rollout.weights import buckets, checksum, flatten, numel_of, trainable


class LearnerWorker:
    """Holds the policy that is trained, its optimizer and its average."""

    def __init__(
        self,
        model: ModelSettings,
        rollout: RolloutSettings,
        learner: LearnerSettings,
        seed: int,
        horizon: int,
    ) -> None:
        """Load the transformer onto the GPU where one is assigned, else onto the CPU.

        ``horizon`` is the length of the run in optimizer steps, for schedules that end with it.
        """
        torch.set_num_threads(learner.threads)
        self.gpu = learner.gpus > 0 and torch.cuda.is_available()
        self.device = "cuda" if self.gpu else "cpu"
        if not self.gpu:
            keep_freed_memory()
        self.model, self.rollout, self.settings, self.horizon = model, rollout, learner, horizon
        self.policy = load_policy(model, rollout, device=self.device, seed=seed, whole=False)
        if learner.gradient_checkpointing:
            self.policy.transformer.enable_gradient_checkpointing()
        self.micro_batch = learner.pairs(self.policy.tokens)
        self.reference = Reference(self.policy.transformer, model, learner, self.device)
        self.parameters = trainable(self.policy.transformer)
        self.buckets = buckets(self.parameters, learner.bucket_mb * 1e6)
        self.staging: Tensor | None = None
        self.storage = Storage()
        self.updates = self.skipped_in_a_row = 0

    def join(self, rank: int, world: int, address: str, port: int) -> None:
        """Form the process group with the other ranks and build the engine; every rank calls it."""
        self.rank, self.world = rank, world
        deepspeed_engine.join(rank, world, address, port, gpu=self.gpu)
        self.guard = GradientGuard(self.parameters, self.device)
        self.reference.join()
        self.engine = deepspeed_engine.build_engine(
            self.policy.transformer, self.parameters, self.settings, self.model.dtype, self.horizon
        )
        masters = deepspeed_engine.Masters(rank, world)
        self.ema = Ema(self.parameters, masters, self.settings.ema_decay, self.settings.ema_every)

    def parts(self) -> int:
        """In how many parts the weights travel."""
        return len(self.buckets)

    def part(self, number: int, averaged: bool = False) -> tuple[str, NDArray[Any] | None]:
        """One part of the weights (of the averaged ones for evaluation) with its checksum.

        Every rank calls it; only rank 0 has something to show. All parts take turns in the same memory, so
        copy one before asking for the next. Under ZeRO-3 no more than one part is whole at a time.
        """
        bucket = self.buckets[number]
        if self.staging is None and self.rank == 0:
            longest = max(map(numel_of, self.buckets))
            self.staging = torch.empty(longest, dtype=self.parameters[0][1].dtype)
        if averaged:
            tensors = [self.ema.whole(name, p).to(p.dtype) for name, p in bucket]
            flat = flatten(tensors, into=self.staging) if self.rank == 0 else None
        else:
            with deepspeed_engine.whole([p for _, p in bucket]):
                flat = flatten((p for _, p in bucket), into=self.staging) if self.rank == 0 else None
        return ("", None) if flat is None else (checksum(flat, bucket), flat)

    def publish(self, averaged: bool = False) -> Iterator[tuple[str, NDArray[Any] | None]]:
        """Every `part` in turn."""
        return (self.part(number, averaged) for number in range(self.parts()))

    def update(self, work: RankUpdate) -> Update:
        """Apply one optimizer step per share; every rank calls it with shares of equal sizes.

        Returns:
            The metrics of the batch, averaged over all ranks (``updates`` counts all optimizer steps that
            were ever applied), and this rank's broken trajectories and parameters.
        """
        started = time.perf_counter()
        metrics = UpdateMetrics(self.settings.clip, self.rollout.steps)
        with self.reference.awake():
            for number, share in enumerate(work.shares):
                rows = rows_of(
                    share,
                    work.trajectories,
                    work.conditionings,
                    self.settings.advantage_clip,
                    self.device,
                )
                self._accumulate(rows, metrics, first=number == 0)
                self._apply(metrics)
        found = metrics.reduce(seconds=time.perf_counter() - started)
        counts = {"skipped_in_a_row": self.skipped_in_a_row, "updates": self.updates}
        return Update(
            metrics={**found, **counts},
            suspects=metrics.suspects(),
            broken=not_finite(self.parameters, self.rank),
        )

    def _accumulate(self, rows: Rows, metrics: UpdateMetrics, *, first: bool) -> None:
        schedule = self.policy.schedule(self.rollout.steps)
        sigmas, timesteps = schedule.sigmas.to(self.device), schedule.timesteps.to(self.device)
        for part in rows.split(self.micro_batch):
            pair = sigmas[part.steps], sigmas[part.steps + 1]
            objective, mean = self._objective(part, pair, timesteps[part.steps])
            # DeepSpeed averages over ranks; the weights already count every trajectory of the world.
            self.engine.backward(objective.loss * self.world)
            pull = mean.grad.flatten(1).norm(dim=1) / self.world
            metrics.add(objective, part, pull, first=first)

    def _objective(
        self, part: Rows, sigmas: tuple[Tensor, Tensor], timestep: Tensor
    ) -> tuple[Objective, Any]:
        """The objective of a micro-batch and the predicted means, which will hold their gradient."""
        # First, since ZeRO-3 expects the policy's own backward right after its forward.
        reference = self._reference_move(part, sigmas, timestep) if self.settings.beta else None
        move = self._move(self.engine, part, sigmas, timestep)
        move.mean.retain_grad()
        log_ratio = log_prob(part.next_states, move) - part.log_probs
        step_size = sigmas[0] - sigmas[1]
        if self.settings.ratio == "guard":
            assert part.means is not None
            log_ratio = guarded_log_ratio(log_ratio, move, part.means)
        surrogate, ratio = clipped_objective(log_ratio, part.advantages, self.settings.clip)
        if self.settings.ratio == "guard":
            surrogate = surrogate / step_size
        kl = torch.zeros_like(ratio)
        if reference is not None:
            kl = gaussian_kl(move, reference)
            kl = flow_grpo_kl(move, reference, step_size) if self.settings.kl == "flow_grpo" else kl
        return weighted_objective(surrogate, ratio, kl, part.weights, self.settings.beta), move.mean

    def _move(self, model: Any, part: Rows, sigmas: tuple[Tensor, Tensor], timestep: Tensor) -> Transition:
        return transition(self.policy, self.rollout, model, part.states, part.conditioning, sigmas, timestep)

    @torch.no_grad()
    def _reference_move(self, part: Rows, sigmas: tuple[Tensor, Tensor], timestep: Tensor) -> Transition:
        with self.reference.active(self.engine) as model:
            return self._move(model, part, sigmas, timestep)

    def _apply(self, metrics: UpdateMetrics) -> None:
        """One optimizer step, unless a gradient of any rank is not finite; then nothing changes anywhere."""
        optimizer = self.engine.basic_optimizer
        optimizer.hold = self.guard.tripped()
        metrics.learning_rate = float(self.engine.get_lr()[0])
        self.engine.step()
        metrics.grad_norms.append(deepspeed_engine.grad_norm(self.engine))
        if optimizer.hold:
            metrics.skipped += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.updates += 1
        self.ema.step(self.updates)

    def save(self, url: str) -> None:
        """Write everything the update depends on to a folder or an fsspec URL; every rank calls it.

        What goes elsewhere is written here first and travels while training goes on; see `saved`.
        """
        self.storage.save(url, self._write)

    def saved(self, wait: bool) -> Written | None:
        """What this rank saved, once all of it has arrived; None before that unless it is to ``wait``."""
        return self.storage.saved(wait)

    def restore(self, url: str) -> None:
        """Continue from what `save` wrote, on any number of ranks; every rank calls it."""
        with self.storage.fetched(url) as path:
            counts = checkpoint.load(path, self.ema)
            self.updates = counts.updates
            with checkpoint.readable(path, counts, self.world, converts=self.rank == 0) as (found, universal):
                deepspeed_engine.restore(self.engine, found, universal=universal)

    def _write(self, path: Path) -> None:
        deepspeed_engine.save(self.engine, path)
        counts = checkpoint.Counts(
            world=self.world, zero_stage=self.settings.zero_stage, updates=self.updates
        )
        checkpoint.save(path, self.ema, counts, writes=self.rank == 0)

    def ping(self) -> int:
        """The number of optimizer steps applied, as a sign of life."""
        return self.updates
