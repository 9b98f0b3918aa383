"""The learner worker: one DeepSpeed rank that applies an objective's updates. It is independent of Ray."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from learner import checkpoint
from learner import engine as deepspeed_engine
from learner.checkpoint_upload import Storage
from learner.ema import Average, Behaviour, Ema
from learner.finite_check import FiniteCheck, not_finite
from learner.loss_scale import LossScale
from learner.metrics import UpdateMetrics
from learner.minibatch import Minibatch
from learner.objectives.base import Models
from learner.objectives.registry import load_objective
from learner.predictor import Predictor
from learner.rank_shares import RankUpdate
from learner.records import AVERAGE, BEHAVIOUR, Update, Written
from learner.reference import Reference
from learner.settings import LearnerSettings
from rollout.families.registry import load_policy
from rollout.families.sequence_parallel import divide
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tensors import allow_tf32, keep_freed_memory
from rollout.weights import buckets, checksum, flatten, numel_of, trainable


class LearnerWorker:
    """One rank of the learner, with the policy that is trained, its optimizer and its average."""

    def __init__(
        self,
        model: ModelSettings,
        rollout: RolloutSettings,
        learner: LearnerSettings,
        seed: int,
        horizon: int,
    ) -> None:
        """Load the transformer onto the GPU if one is assigned, else onto the CPU.

        ``horizon`` is the length of the run in optimizer steps, at which learning-rate schedules end.
        """
        torch.set_num_threads(learner.threads)
        self.gpu = learner.gpus > 0 and torch.cuda.is_available()
        self.device = "cuda" if self.gpu else "cpu"
        if not self.gpu:
            keep_freed_memory()
        allow_tf32(model.dtype)
        self.model, self.rollout, self.settings, self.horizon = model, rollout, learner, horizon
        # Under ZeRO-3 the model is divided among the ranks from the CPU's memory: see `join`.
        self.policy = load_policy(
            model, rollout, device=self.device, seed=seed, whole=False, placed=learner.zero_stage < 3
        )
        if learner.gradient_checkpointing:
            self.policy.transformer.enable_gradient_checkpointing()
        self.micro_batch = learner.pairs(self.policy.tokens)
        self.objective = load_objective(learner.objective)
        self.reference = Reference(
            self.policy.transformer, model, learner, self.device, used=self.objective.needs_reference
        )
        self.models = self._models()
        self.parameters = trainable(self.policy.transformer)
        self.loss_scale = LossScale(self.parameters, model.dtype)
        self.finite_check = FiniteCheck(self.parameters, self.device)  # sees gradients without the scale
        self.buckets = buckets(self.parameters, learner.bucket_mb * 1e6)
        self.staging: Tensor | None = None
        self.storage = Storage()
        self.updates = self.skipped_in_a_row = 0
        self.together = 1  # ranks that divide the tokens of each row

    def _models(self) -> Models:
        """Build the models that the objective calls; they use the engine, which `join` builds later."""
        frozen = Predictor(self.policy, self.rollout, lambda: self.reference.active(self.engine))
        return Models(
            policy=Predictor(self.policy, self.rollout, lambda: nullcontext(self.engine)),
            reference=frozen if self.objective.needs_reference else None,
        )

    def join(self, rank: int, world: int, address: str, port: int) -> None:
        """Form the process group with the other ranks and build the engine; every rank calls it."""
        self.rank, self.world = rank, world
        deepspeed_engine.join(rank, world, address, port, gpu=self.gpu)
        if world > 1 and self.settings.sequence_parallel > 1:  # a world of one stands for any
            self.together = self.settings.sequence_parallel
            for transformer in filter(None, (self.policy.transformer, self.reference.copy)):
                divide(transformer, self.together, world, self.device)
        if self.settings.zero_stage == 3:
            deepspeed_engine.partition(self.policy.transformer, self.settings, self.device)
        self.reference.join()
        self.engine = deepspeed_engine.build_engine(
            self.policy.transformer, self.parameters, self.settings, self.horizon
        )
        self.start_averages(rank, world)

    def start_averages(self, rank: int, world: int) -> None:
        """Start the averages of the weights, of which each rank keeps its share."""
        self.masters = deepspeed_engine.Masters(rank, world)
        self.ema = Ema(self.parameters, self.masters, self.settings.ema_decay, self.settings.ema_every)
        self.behaviour = Behaviour(self.parameters, self.masters) if self.objective.lags else None

    @property
    def averages(self) -> dict[str, Average]:
        """The averages of the weights, by their files in a checkpoint."""
        return {AVERAGE: self.ema} | ({BEHAVIOUR: self.behaviour} if self.behaviour else {})

    def join_alone(self) -> None:
        """Be the only rank of a world."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        self.join(0, 1, "127.0.0.1", port)

    def parts(self) -> int:
        """Count the parts in which the weights are published."""
        return len(self.buckets)

    def part(self, number: int, averaged: bool = False) -> tuple[str, NDArray[Any] | None]:
        """Return one part of the samplers' weights, or of the averaged ones to evaluate, with its checksum.

        Every rank calls it; only rank 0 returns values. All parts reuse the same memory, so copy one before
        requesting the next. Under ZeRO-3 at most one part is gathered at a time.
        """
        bucket = self.buckets[number]
        if self.staging is None and self.rank == 0:
            longest = max(map(numel_of, self.buckets))
            self.staging = torch.empty(longest, dtype=self.parameters[0][1].dtype)
        average = self.ema if averaged else self.behaviour
        if average is not None:
            tensors = [average.whole(name, p).to(p.dtype) for name, p in bucket]
            flat = flatten(tensors, into=self.staging) if self.rank == 0 else None
        else:
            with deepspeed_engine.whole([p for _, p in bucket]):
                flat = flatten((p for _, p in bucket), into=self.staging) if self.rank == 0 else None
        return ("", None) if flat is None else (checksum(flat, bucket), flat)

    def publish(self, averaged: bool = False) -> Iterator[tuple[str, NDArray[Any] | None]]:
        """Return an iterator over every `part`."""
        return (self.part(number, averaged) for number in range(self.parts()))

    def update(self, work: RankUpdate) -> Update:
        """Apply one optimizer step per share; every rank calls it with shares of equal sizes.

        Returns:
            The metrics of the batch, averaged over all ranks (``updates`` counts all optimizer steps
            applied since the run began), and this rank's trajectories and parameters that are not finite.
        """
        started, before = time.perf_counter(), self.updates
        metrics = UpdateMetrics(self.objective.metrics, self.rollout.steps, self.together)
        with self.reference.on_device():
            for number, (share, parts) in enumerate(zip(work.shares, self._minibatches(work), strict=True)):
                largest = max(one.weight for one in share)
                self._accumulate(parts, metrics, largest, first=number == 0)
                self._apply(metrics)
        if self.behaviour is not None and self.updates > before:
            self.behaviour.blend(self.objective.behaviour_decay(self.updates))
        found = metrics.reduce(seconds=time.perf_counter() - started)
        counts = {"skipped_in_a_row": self.skipped_in_a_row, "updates": self.updates}
        return Update(
            metrics={**found, **counts},
            suspects=metrics.suspects(),
            broken=not_finite(self.parameters, self.rank),
        )

    def _minibatches(self, work: RankUpdate) -> Sequence[Iterable[Minibatch]]:
        """Build the mini-batches of every share, as the objective wants them."""
        schedule = self.policy.schedule(self.rollout.steps).to(self.device)
        data, size = (work.trajectories, work.conditionings), self.micro_batch
        shares = [
            self.objective.minibatches(share, *data, schedule=schedule, size=size) for share in work.shares
        ]
        with self.behaviour.active() if self.behaviour else nullcontext():
            return self.objective.prepared(self.models, shares)

    def _accumulate(
        self, parts: Iterable[Minibatch], metrics: UpdateMetrics, largest: float, *, first: bool
    ) -> None:
        """Add up the gradients of mini-batches, of which ``largest`` is a candidate's largest weight."""
        for part in parts:
            terms = self.objective.loss(self.models, part)
            prediction: Any = terms.prediction
            prediction.retain_grad()
            loss = (part.weights * terms.losses).sum()
            # DeepSpeed averages over ranks; the weights already count every trajectory of the world.
            factor = self.world * self.loss_scale.set(prediction[0].numel(), largest)
            self.engine.backward(loss * factor)
            mean_grad_norms = prediction.grad.flatten(1).norm(dim=1) / factor
            metrics.add(terms, part, loss.detach(), mean_grad_norms, first=first)

    def _apply(self, metrics: UpdateMetrics) -> None:
        """Apply an optimizer step, or skip it on every rank if a gradient of any rank is not finite."""
        optimizer = self.engine.basic_optimizer
        optimizer.hold = self.finite_check.failed()
        metrics.learning_rate = float(self.engine.get_lr()[0])
        self.engine.step()
        metrics.grad_norms.append(deepspeed_engine.grad_norm(self.engine))
        self.loss_scale.record(overflowed=optimizer.hold)
        if optimizer.hold:
            metrics.skipped += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.updates += 1
        self.ema.step(self.updates)

    def save(self, url: str) -> None:
        """Write the state of training to a folder or an fsspec URL; every rank calls it.

        Files for a remote store are written to local disk first and uploaded while training continues; see
        `saved`.
        """
        self.storage.save(url, self._write)

    def saved(self, wait: bool) -> Written | None:
        """Return this rank's files of the last `save`; without ``wait``, None while the upload is running."""
        return self.storage.saved(wait)

    def restore(self, url: str) -> None:
        """Restore the state that `save` wrote, on any number of ranks; every rank calls it.

        Raises:
            ValueError: if its trained parameters are in half precision, as in the oldest checkpoints.
        """
        with self.storage.fetched(url) as path:
            counts = checkpoint.load(path, self.parameters, self.averages)
            if counts.loss_scale is None and self.model.dtype != "float32":
                raise ValueError(
                    f"{url}: trained in {self.model.dtype} by an older version, which rounded parameters; "
                    "export its weights, and start a run from these"
                )
            self.updates = counts.updates
            self.loss_scale.lowered, self.loss_scale.steps = counts.loss_scale or (0, 0)
            with checkpoint.readable(path, counts, self.world, converts=self.rank == 0) as (found, universal):
                deepspeed_engine.restore(self.engine, found, universal=universal)

    def _write(self, path: Path) -> None:
        deepspeed_engine.save(self.engine, path)
        counts = checkpoint.Counts(
            world=self.world,
            zero_stage=self.settings.zero_stage,
            updates=self.updates,
            loss_scale=(self.loss_scale.lowered, self.loss_scale.steps),
        )
        checkpoint.save(path, self.parameters, self.masters, self.averages, counts, writes=self.rank == 0)

    def ping(self) -> int:
        """Return the number of optimizer steps applied, to show that the worker responds."""
        return self.updates
