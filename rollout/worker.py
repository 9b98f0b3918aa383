"""The rollout worker: oversamples the noise of one prompt at a time. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rollout.families import Schedule, Tensors, load_policy
from rollout.noise import candidate_noises
from rollout.records import Begun, Conditioning, Noise, Prompt, SampleRequest, Trajectory, WeightsMismatch
from rollout.sampler import Rollout, denoise, trained_window
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tensors import bucket_of, keep_freed_memory, load_flat, pack, trainable, unpack


class StaleWeights(RuntimeError):
    """A group asks for a policy version that this worker does not hold."""


class RolloutWorker:
    """Holds one copy of the policy; samples groups under the version it was asked for, or refuses."""

    def __init__(
        self, model: ModelSettings, rollout: RolloutSettings, seed: int, *, keep_means: bool = False
    ) -> None:
        """Load the pipeline onto the GPU where one is assigned, else onto the CPU.

        ``keep_means`` stores the behaviour policy's means with the trajectories.
        """
        torch.set_num_threads(rollout.threads)
        self.device = "cuda" if rollout.gpus > 0 and torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            keep_freed_memory()
        self.settings = rollout
        self.seed, self.keep_means = seed, keep_means
        self.policy = load_policy(model, rollout, device=self.device, seed=seed)
        self.parameters = trainable(self.policy.transformer)
        self.policy.transformer.eval().requires_grad_(False)
        self.missing = self.parameters
        self.version = -1
        # The chunks of a group come one after the other and share a prompt.
        self._encode = lru_cache(maxsize=1)(self.policy.encode)
        if model.compile:
            self._warm_up()

    def load(self, version: int, part: int, parts: int, digest: str, flat: NDArray[Any]) -> int:
        """Take over one of the parts of published weights; they come in order, with their checksums.

        Until the last one is in, the worker holds no version at all and samples nothing.

        Returns:
            The version held now: -1 until the weights are whole.

        Raises:
            WeightsMismatch: if the array is not what its checksum says, or not the next part.
        """
        if part == 0:
            self.missing = self.parameters
        self.version = -1
        bucket = bucket_of(self.missing, len(flat))
        load_flat(flat, bucket, digest)
        self.missing = self.missing[len(bucket) :]
        if part == parts - 1:
            if self.missing:
                raise WeightsMismatch(f"weights ended before {self.missing[0][0]}")
            self.version = version
        return self.version

    def sample(self, request: SampleRequest, *begun: Begun) -> tuple[Any, ...]:
        """Sample a group, or a chunk of it; or finish candidates that `begin` has begun.

        Returns:
            The seconds it took, the images (n, H, W, 3) uint8, the conditioning, and n trajectories: each
            its own return value, so that the unselected ones can be freed where they were made.

        Raises:
            StaleWeights: if the worker holds another policy version.
        """
        started = time.perf_counter()
        conditioning, window, parts = self._run(request, begun, None)
        trajectories = [t for part in parts for t in _trajectories(part, window, self.keep_means)]
        arrays = {name: pack(value) for name, value in conditioning.items()}
        images = self._decode(parts)
        return time.perf_counter() - started, images, Conditioning(arrays=arrays), *trajectories

    def begin(self, request: SampleRequest) -> tuple[Any, ...]:
        """Sample the first ``preview_steps`` steps only.

        Returns:
            The seconds it took, previews (n, H, W, 3) uint8 of the clean images that the candidates point
            at by then, and the n `Begun` candidates.

        Raises:
            StaleWeights: if the worker holds another policy version.
        """
        started = time.perf_counter()
        _, _, parts = self._run(request, (), self.settings.preview_steps)
        images = self._decode(parts)
        return time.perf_counter() - started, images, *(one for part in parts for one in _begun(part))

    def _run(
        self, request: SampleRequest, begun: Sequence[Begun], stop: int | None
    ) -> tuple[Tensors, range, list[Rollout]]:
        if request.version != self.version:
            raise StaleWeights(
                f"group {request.group_id} wants policy v{request.version}, not v{self.version}"
            )
        window = trained_window(self.settings, self.seed, request.group_id)
        conditioning = self._encode(request.prompt.text)
        repeated = {k: v.expand(len(request.noises), *v.shape) for k, v in conditioning.items()}
        schedule = self._schedule(self.settings.steps)
        return conditioning, window, self._denoise(repeated, request.noises, schedule, window, begun, stop)

    def evaluate(self, prompts: Sequence[Prompt], noises: Sequence[Noise]) -> tuple[int, NDArray[np.uint8]]:
        """N, and images (N, H, W, 3) of N prompts by the ODE, one fixed initial noise each."""
        encoded = [self.policy.encode(prompt.text) for prompt in prompts]
        conditioning = {name: torch.stack([one[name] for one in encoded]) for name in encoded[0]}
        schedule = self._schedule(self.settings.eval_steps)
        return len(prompts), self._decode(self._denoise(conditioning, noises, schedule, range(0)))

    def _warm_up(self) -> None:
        """Run one forward pass of a full batch: an actor may take its time to start, a call may not."""
        noises = candidate_noises(self.seed, 0, 0, self.settings.batch)
        text = {name: value.expand(len(noises), *value.shape) for name, value in self._encode("").items()}
        self._denoise(text, noises, self._schedule(self.settings.steps), range(0), stop=1)

    def ping(self) -> int:
        """The policy version held, as a sign of life."""
        return self.version

    def _schedule(self, steps: int) -> Schedule:
        schedule = self.policy.schedule(steps)
        return Schedule(schedule.sigmas.to(self.device), schedule.timesteps.to(self.device))

    def _denoise(
        self,
        conditioning: Tensors,
        noises: Sequence[Noise],
        schedule: Schedule,
        window: range,
        begun: Sequence[Begun] = (),
        stop: int | None = None,
    ) -> list[Rollout]:
        size = self.settings.batch
        parts = []
        for i in range(0, len(noises), size):
            chunk = {name: value[i : i + size] for name, value in conditioning.items()}
            resumed = self._resumed(begun[i : i + size]) if begun else None
            parts.append(
                denoise(
                    self.policy, self.settings, chunk, noises[i : i + size], schedule, window,
                    begun=resumed, stop=stop,
                )
            )  # fmt: skip
        return parts

    def _resumed(self, begun: Sequence[Begun]) -> Rollout:
        x, states, log_probs, means = (
            torch.stack([unpack(getattr(one, name)) for one in begun]).to(self.device)
            for name in ("x", "latents", "log_probs", "means")
        )
        return Rollout(self.settings.preview_steps, x, x, states, log_probs, means)

    def _decode(self, parts: Sequence[Rollout]) -> NDArray[np.uint8]:
        return np.concatenate([self.policy.decode(part.clean).numpy() for part in parts])


def _begun(part: Rollout) -> list[Begun]:
    return [
        Begun(x=pack(x), latents=pack(states), log_probs=pack(log_probs), means=pack(means))
        for x, states, log_probs, means in zip(part.x, part.states, part.log_probs, part.means, strict=True)
    ]


def _trajectories(part: Rollout, window: range, keep_means: bool) -> list[Trajectory]:
    steps = np.asarray(window, dtype=np.int64)
    return [
        Trajectory(
            latents=pack(states),
            log_probs=log_probs.cpu().numpy(),
            steps=steps,
            means=pack(means) if keep_means else None,
        )
        for states, log_probs, means in zip(part.states, part.log_probs, part.means, strict=True)
    ]
