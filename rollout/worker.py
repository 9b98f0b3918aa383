"""The rollout worker, which samples the candidates of prompts in full batches, without Ray."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollout.batches import Batch, batches
from rollout.families.registry import Schedule, Tensors, load_policy
from rollout.noise import candidate_noises, held_out_latents
from rollout.records import (
    Begun,
    Chunk,
    Conditioning,
    Keep,
    Noise,
    Prompt,
    SampleRequest,
    Trajectory,
    WeightsId,
    WeightsMismatch,
)  # fmt: skip
from rollout.sampler import Rollout, denoise, started, trained_window
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tensors import allow_tf32, keep_freed_memory, pack, unpack, upload
from rollout.weights import bucket_of, load_flat, trainable


class StaleWeights(RuntimeError):
    """A group asks for another policy version than the worker holds."""


class RolloutWorker:
    """A copy of the policy that samples groups under the requested version, or refuses."""

    def __init__(
        self,
        model: ModelSettings,
        rollout: RolloutSettings,
        seed: int,
        *,
        keeps: Collection[Keep] = ("states", "log_probs"),
    ) -> None:
        """Load the pipeline onto the GPU where one is assigned, else onto the CPU: weights of version 0.

        ``keeps`` says what trajectories hold: what the learner's objective needs.
        """
        torch.set_num_threads(rollout.threads)
        self.device = "cuda" if rollout.gpus > 0 and torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            keep_freed_memory()
        allow_tf32(model.dtype)
        self.settings = rollout
        self.seed, self.keeps = seed, keeps
        self.policy = load_policy(model, rollout, device=self.device, seed=seed)
        self.parameters = trainable(self.policy.transformer)
        self.policy.transformer.eval().requires_grad_(False)
        self.missing = self.parameters
        self.holds: WeightsId | None = WeightsId(0)
        # The batches of a group are consecutive and share a prompt.
        self._encode = lru_cache(maxsize=rollout.batch)(self.policy.encode)
        if model.compile:
            self._warm_up()

    def load(
        self, weights: WeightsId, part: int, parts: int, digest: str, flat: NDArray[Any]
    ) -> WeightsId | None:
        """Load one part of published weights; parts arrive in order, with their checksums.

        Until the last part is loaded, the worker has no weights and samples nothing.

        Returns:
            The current weights: None until they are complete.

        Raises:
            WeightsMismatch: if the array does not match its checksum, or is not the next part.
        """
        if part == 0:
            self.missing = self.parameters
        self.holds = None
        bucket = bucket_of(self.missing, len(flat))
        load_flat(flat, bucket, digest)
        self.missing = self.missing[len(bucket) :]
        if part == parts - 1:
            if self.missing:
                raise WeightsMismatch(f"weights ended before {self.missing[0][0]}")
            self.holds = weights
        return self.holds

    def sample(self, requests: Sequence[SampleRequest]) -> list[Chunk]:
        """Sample groups, or parts of them, in full batches that may combine several groups.

        Returns:
            The chunk of every request.

        Raises:
            StaleWeights: if the worker has another policy version.
        """
        started, parts = time.perf_counter(), self._batches(requests)
        return self._finished(started, requests, parts, [self._run(part) for part in parts])

    def begin(self, requests: Sequence[SampleRequest]) -> list[Chunk]:
        """Draft candidates: sample the first ``draft_steps`` steps only, or an ODE of so many steps.

        Returns:
            A chunk of drafts for every request: of the clean images predicted at that step, with the
            candidates begun, or of images by the ODE.

        Raises:
            StaleWeights: if the worker has another policy version.
        """
        started, parts = time.perf_counter(), self._batches(requests)
        steps = self.settings.drafted_steps
        if self.settings.draft_kind == "ode":
            rollouts = [self._run(part, steps=steps) for part in parts]
            begun: list[Begun | None] = [None] * sum(len(one.noises) for one in requests)
        else:
            rollouts = [self._run(part, stop=steps) for part in parts]
            begun = [one for part in rollouts for one in _begun(part)]
        return self._chunks(started, requests, rollouts, begun, [None] * len(requests))

    def finish(self, requests: Sequence[SampleRequest], *begun: Begun) -> list[Chunk]:
        """Sample the other steps of candidates that `begin` has begun, in the order of the requests.

        Raises:
            StaleWeights: if the worker has another policy version.
        """
        started, rest, parts = time.perf_counter(), iter(begun), self._batches(requests)
        counts = [sum(len(one.noises) for one in part) for part in parts]
        resumed = [self._resumed([*islice(rest, count)]) for count in counts]
        rollouts = [self._run(part, begun=one) for part, one in zip(parts, resumed, strict=True)]
        return self._finished(started, requests, parts, rollouts)

    def _finished(
        self,
        started: float,
        requests: Sequence[SampleRequest],
        parts: Sequence[Batch],
        rollouts: Sequence[Rollout],
    ) -> list[Chunk]:
        trajectories = [
            trajectory
            for part, rollout in zip(parts, rollouts, strict=True)
            for trajectory in _trajectories(rollout, self._window(part), self.keeps, self.settings.storage)
        ]
        encoded = [self._encode(request.prompt.text) for request in requests]
        conditionings = [
            Conditioning(arrays={name: pack(value) for name, value in one.items()}) for one in encoded
        ]
        return self._chunks(started, requests, rollouts, trajectories, conditionings)

    def _chunks(
        self,
        started: float,
        requests: Sequence[SampleRequest],
        rollouts: Sequence[Rollout],
        trajectories: Sequence[Trajectory | Begun | None],
        conditionings: Sequence[Conditioning | None],
    ) -> list[Chunk]:
        images, finite = self._decode(rollouts)
        each = (time.perf_counter() - started) / len(images)
        ends = np.cumsum([len(request.noises) for request in requests]).tolist()
        return [
            Chunk(
                images=images[start:end],
                finite=finite[start:end],
                conditioning=conditioning,
                trajectories=tuple(trajectories[start:end]),
                seconds=each * (end - start),
            )
            for start, end, conditioning in zip([0, *ends], ends, conditionings, strict=False)
        ]

    def _batches(self, requests: Sequence[SampleRequest]) -> list[Batch]:
        for request in requests:
            wanted = WeightsId(request.version)
            if wanted != self.holds:
                raise StaleWeights(f"group {request.group_id} wants policy {wanted}, not {self.holds}")
        return batches(requests, self.settings)

    def _run(
        self,
        batch: Batch,
        *,
        begun: Rollout | None = None,
        stop: int | None = None,
        steps: int | None = None,
    ) -> Rollout:
        """Sample a batch, or by an ODE of its own of other ``steps``."""
        encoded = [self._encode(part.prompt.text) for part in batch]
        owners = [owner for owner, part in enumerate(batch) for _ in part.noises]
        noises = [noise for part in batch for noise in part.noises]
        schedule = self._schedule(steps or self.settings.steps)
        window = range(0) if steps else self._window(batch)
        return self._denoise(encoded, owners, noises, schedule, window, begun=begun, stop=stop)

    def evaluate(
        self, prompts: Sequence[Prompt], noises: Sequence[Noise]
    ) -> tuple[tuple[bool, ...], NDArray[np.uint8]]:
        """Sample images (N, H, W, 3) of N prompts by the ODE, with one fixed initial noise each.

        Returns:
            Whether each image is finite, and the images, which the driver does not read.
        """
        schedule, size = self._schedule(self.settings.eval_steps), self.settings.batch
        parts = []
        for i in range(0, len(prompts), size):
            encoded, mine = [self._encode(one.text) for one in prompts[i : i + size]], noises[i : i + size]
            x = upload(held_out_latents(mine, self.policy.latent_shape()), self.policy.device)
            owners = range(len(encoded))
            name = self.settings.eval_solver
            drawn = self._denoise(encoded, owners, mine, schedule, range(0), begun=started(x), name=name)
            parts.append(drawn)
        images, finite = self._decode(parts)
        return finite, images

    def _warm_up(self) -> None:
        """Run a forward pass and decode a full batch: compilation may delay a start, but not a call."""
        noises = candidate_noises(self.seed, 0, 0, self.settings.batch)
        schedule = self._schedule(self.settings.steps)
        begun = self._denoise([self._encode("")], [0] * len(noises), noises, schedule, range(0), stop=1)
        self._decode([begun])

    def ping(self) -> WeightsId | None:
        """Return the current weights, which confirms that the worker responds."""
        return self.holds

    def _schedule(self, steps: int) -> Schedule:
        schedule: Schedule = self.policy.schedule(steps)
        return schedule.to(self.device)

    def _denoise(
        self,
        encoded: Sequence[Tensors],
        owners: Sequence[int],
        noises: Sequence[Noise],
        schedule: Schedule,
        window: range,
        **part: Any,
    ) -> Rollout:
        conditioning = {name: _rows([one[name] for one in encoded], owners) for name in encoded[0]}
        keep_means = "means" in self.keeps
        return denoise(
            self.policy, self.settings, conditioning, noises, schedule, window, keep_means=keep_means, **part
        )

    def _window(self, batch: Batch) -> range:
        return trained_window(self.settings, self.seed, batch[0].group_id)

    def _resumed(self, begun: Sequence[Begun]) -> Rollout:
        x, states, log_probs, means = (
            torch.stack([unpack(getattr(one, name)) for one in begun]).to(self.device)
            for name in ("x", "states", "log_probs", "means")
        )
        return Rollout(self.settings.drafted_steps, x, x, states, log_probs, means)

    def _decode(self, parts: Sequence[Rollout]) -> tuple[NDArray[np.uint8], tuple[bool, ...]]:
        images, finite = zip(*(self.policy.decode(part.clean) for part in parts), strict=True)
        return torch.cat(images).numpy(), tuple(torch.cat(finite).tolist())


def _rows(values: Sequence[Tensor], owners: Sequence[int]) -> Tensor:
    """Repeat every owner's value in its rows.

    Also one that all rows share is copied: an expanded tensor is multiplied by another kernel than the
    learner's, and in half precision the bias is then added after rounding.
    """
    return torch.stack([values[owner] for owner in owners])


def _begun(part: Rollout) -> list[Begun]:
    fields = ("x", "states", "log_probs", "means")
    packed = {name: pack(getattr(part, name)) for name in fields}
    return [Begun(**{name: packed[name][row] for name in fields}) for row in range(len(part.x))]


def _trajectories(part: Rollout, window: range, keeps: Collection[Keep], storage: str) -> list[Trajectory]:
    steps = np.asarray(window, dtype=np.int64)
    part = replace(part, clean=part.clean.to(getattr(torch, storage)))
    packed = {name: pack(getattr(part, name)) for name in keeps}  # a copy from the device for the whole batch
    return [
        Trajectory(steps=steps, **{name: packed[name][row] for name in keeps}) for row in range(len(part.x))
    ]
