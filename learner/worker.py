"""The learner worker: one DeepSpeed rank that applies FlowGRPO updates. Knows nothing of Ray."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner import engine as deepspeed_engine
from learner.batch import Item
from learner.ema import Ema
from learner.loss import Objective, clipped_objective, flow_grpo_kl, gaussian_kl, weighted_objective
from learner.metrics import UpdateMetrics
from learner.rows import Rows, rows_of
from learner.settings import LearnerSettings
from rollout.adapter import adapter_off
from rollout.families import load_policy
from rollout.records import Conditioning, Trajectory
from rollout.sampler import transition
from rollout.sde import Transition, log_prob
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tensors import checksum, flatten, trainable


class LearnerWorker:
    """Holds the policy that is trained, its optimizer and its average."""

    def __init__(
        self, model: ModelSettings, rollout: RolloutSettings, learner: LearnerSettings, seed: int
    ) -> None:
        """Load the transformer onto the GPU where one is assigned, else onto the CPU."""
        torch.set_num_threads(learner.threads)
        self.gpu = learner.gpus > 0 and torch.cuda.is_available()
        self.device = "cuda" if self.gpu else "cpu"
        self.model, self.rollout, self.settings = model, rollout, learner
        self.policy = load_policy(model, rollout, device=self.device, seed=seed, whole=False)
        if learner.gradient_checkpointing:
            self.policy.transformer.enable_gradient_checkpointing()
        self.reference = self._frozen_reference()
        self.parameters = trainable(self.policy.transformer)
        self.updates = 0

    def _frozen_reference(self) -> Any:
        """A second copy for the KL term, where there is no adapter that could be switched off."""
        if self.settings.beta == 0 or self.model.lora_rank:
            return None
        return copy.deepcopy(self.policy.transformer).eval().requires_grad_(False)

    def join(self, rank: int, world: int, address: str, port: int) -> None:
        """Form the process group with the other ranks and build the engine; every rank calls it."""
        self.rank, self.world = rank, world
        deepspeed_engine.join(rank, world, address, port, gpu=self.gpu)
        self.engine = deepspeed_engine.build_engine(
            self.policy.transformer, self.parameters, self.settings, self.model.dtype
        )
        self.ema = Ema(self.parameters, self.settings.ema_decay, self.settings.ema_every)

    def publish(self, averaged: bool = False) -> tuple[str, NDArray[np.float32] | None]:
        """The checksum and the flat weights (the averaged ones for evaluation); only rank 0 has them."""
        if self.rank:
            return "", None
        flat = flatten(self.ema.shadow if averaged else [p for _, p in self.parameters])
        return checksum(flat, self.parameters), flat

    def update(
        self, shares: Sequence[Sequence[Item]], groups: Sequence[int], *arrays: Any
    ) -> dict[str, float]:
        """Apply one optimizer step per share; every rank calls it with shares of equal sizes.

        ``arrays`` are the conditionings of ``groups``, in that order, then every trajectory that an
        item's ``trajectory`` points to, in order of that number.

        Returns:
            The metrics of the batch, averaged over all ranks.
        """
        started = time.perf_counter()
        conditionings: dict[int, Conditioning] = dict(zip(groups, arrays, strict=False))
        numbers = sorted({item.trajectory for share in shares for item in share})
        trajectories: dict[int, Trajectory] = dict(zip(numbers, arrays[len(groups) :], strict=True))
        metrics = UpdateMetrics(self.settings.clip)
        for number, share in enumerate(shares):
            rows = rows_of(share, trajectories, conditionings, self.settings.advantage_clip, self.device)
            self._accumulate(rows, metrics, first=number == 0)
            self._apply(metrics)
        return metrics.reduce(seconds=time.perf_counter() - started)

    def _accumulate(self, rows: Rows, metrics: UpdateMetrics, *, first: bool) -> None:
        schedule = self.policy.schedule(self.rollout.steps)
        sigmas, timesteps = schedule.sigmas.to(self.device), schedule.timesteps.to(self.device)
        for part in rows.split(self.settings.micro_batch):
            pair = sigmas[part.steps], sigmas[part.steps + 1]
            objective = self._objective(part, pair, timesteps[part.steps])
            # DeepSpeed averages over ranks; the weights already count every trajectory of the world.
            self.engine.backward(objective.loss * self.world)
            metrics.add(objective, part.weights, first=first)

    def _objective(self, part: Rows, sigmas: tuple[Tensor, Tensor], timestep: Tensor) -> Objective:
        move = transition(
            self.policy, self.rollout, self.engine, part.states, part.conditioning, sigmas, timestep
        )
        surrogate, ratio = clipped_objective(
            log_prob(part.next_states, move), part.log_probs, part.advantages, self.settings.clip
        )
        kl = self._kl(move, part, sigmas, timestep) if self.settings.beta else torch.zeros_like(ratio)
        return weighted_objective(surrogate, ratio, kl, part.weights, self.settings.beta)

    @torch.no_grad()
    def _reference_move(self, part: Rows, sigmas: tuple[Tensor, Tensor], timestep: Tensor) -> Transition:
        model = self.reference or self.policy.transformer
        return transition(self.policy, self.rollout, model, part.states, part.conditioning, sigmas, timestep)

    def _kl(self, move: Transition, part: Rows, sigmas: tuple[Tensor, Tensor], timestep: Tensor) -> Tensor:
        if self.reference is not None:
            reference = self._reference_move(part, sigmas, timestep)
        else:
            with adapter_off(self.policy.transformer):
                reference = self._reference_move(part, sigmas, timestep)
        if self.settings.kl == "flow_grpo":
            return flow_grpo_kl(move, reference, sigmas[0] - sigmas[1])
        return gaussian_kl(move, reference)

    def _apply(self, metrics: UpdateMetrics) -> None:
        metrics.learning_rate = float(self.engine.get_lr()[0])
        self.engine.step()
        self.updates += 1
        metrics.grad_norms.append(float(self.engine.get_global_grad_norm()))
        self.ema.step(self.updates)

    def save(self, folder: str) -> None:
        """Write everything the update depends on; every rank calls it."""
        deepspeed_engine.save(self.engine, Path(folder))
        if self.rank == 0:
            state = {**self.ema.state(), "updates": torch.tensor(self.updates)}
            save_file(state, str(Path(folder) / "average.safetensors"))

    def restore(self, folder: str) -> None:
        """Continue from what `save` wrote; every rank calls it."""
        deepspeed_engine.restore(self.engine, Path(folder))
        state = load_file(str(Path(folder) / "average.safetensors"))
        self.updates = int(state.pop("updates"))
        self.ema.load(state)

    def ping(self) -> int:
        """The number of optimizer steps applied, as a sign of life."""
        return self.updates
