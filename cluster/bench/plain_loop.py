"""A straightforward FlowGRPO step for comparison, batch after batch and timestep after timestep.

It has the structure of Flow-GRPO's own script: prompts are encoded batch by batch, a forward pass has one
timestep of a few trajectories, the reference is a pass of its own with the adapter disabled, and the backward
pass goes through both branches of the guidance. It makes as many passes of as many rows and takes as long
(BENCHMARKS.md). Maths, noise and order of trajectories are those of the service, so the losses must be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.bench.subject import Subject
from cluster.config.errors import UserError
from learner.objectives.flow_grpo import FlowGRPOSettings, clipped_surrogate, gaussian_kl
from learner.rank_shares import Assignment
from learner.settings import LearnerSettings
from rollout.families.registry import load_policy
from rollout.families.transformer import adapter_off
from rollout.noise import initial_latents, path_noise
from rollout.records import Noise, SampleRequest
from rollout.sde import Transition, euler, flow_sde, log_prob
from rollout.weights import trainable

Text = tuple[Tensor, Tensor]


def supports(policy: Any) -> bool:
    """Return whether the plain loop can run a policy."""
    return bool(policy.index["_class_name"] == "StableDiffusion3Pipeline" and policy.guided)


class PlainLoop:
    """One model that samples and learns, with ``batch`` images or trajectories per forward pass."""

    def __init__(self, one: Subject, learner: LearnerSettings, batch: int) -> None:
        """Load the pipeline, with an adapter from the same seed as the service's."""
        assert isinstance(learner.objective, FlowGRPOSettings)
        self.one, self.learner, self.batch, self.objective = one, learner, batch, learner.objective
        self.policy = load_policy(one.model, one.rollout, device=one.device, seed=0)
        if not supports(self.policy):
            raise UserError("bench step: the plain loop supports only SD3 and SD3.5 with guidance above 1")
        self.transformer = self.policy.transformer
        self.parameters = trainable(self.transformer)
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.parameters],
            lr=learner.learning_rate, betas=learner.betas, weight_decay=learner.weight_decay,
        )  # fmt: skip
        self.schedule = self.policy.schedule(one.rollout.steps).to(one.device)
        self.trained = range(*one.rollout.window_range)
        self.empty = self._encode([""])

    def step(self, asked: Sequence[SampleRequest], plan: Sequence[Sequence[Assignment]]) -> float:
        """Sample all requests, apply one optimizer step per share of the plan, and return the mean loss."""
        images = [(request.prompt.text, noise) for request in asked for noise in request.noises]
        parts = [images[i : i + self.batch] for i in range(0, len(images), self.batch)]
        sampled = [self._sample([text for text, _ in part], [noise for _, noise in part]) for part in parts]
        whole = tuple(torch.cat(parts) for parts in zip(*sampled, strict=True))
        return float(np.mean([self._update(share, *whole) for share in plan]))

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Text:
        """Return joint states and pooled embeddings of some prompts."""
        hidden, _, pooled, _ = self.policy.pipeline.encode_prompt(
            texts, None, None,
            device=self.policy.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.one.rollout.text_tokens,
        )  # fmt: skip
        return hidden, pooled

    def _both(self, text: Text) -> Text:
        """Return the texts of both branches of the guidance: without the prompts, then with them."""
        hidden, pooled = (
            torch.cat([empty.expand_as(some), some]) for empty, some in zip(self.empty, text, strict=True)
        )
        return hidden, pooled

    def _velocity(self, x: Tensor, timestep: Tensor, text: Text) -> Tensor:
        found = self.transformer(
            hidden_states=torch.cat([x, x]).to(self.policy.dtype),
            timestep=timestep.expand(2 * len(x)),
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            return_dict=False,
        )[0]
        without, with_prompt = found.float().chunk(2)
        without = without.detach()  # as published; the backward pass still goes through its rows
        velocity: Tensor = without + self.one.rollout.guidance * (with_prompt - without)
        return velocity

    def _move(self, x: Tensor, step: int, text: Text) -> Transition:
        v = self._velocity(x, self.schedule.timesteps[step], text)
        ones = torch.ones(len(x), *[1] * (x.ndim - 1), device=x.device)
        sigma, sigma_next = (s * ones for s in self.schedule.sigmas[step : step + 2])
        return flow_sde(x, v, sigma, sigma_next, self.one.rollout.noise_level)

    @torch.no_grad()
    def _sample(self, texts: list[str], noises: Sequence[Noise]) -> tuple[Tensor, ...]:
        """Sample and decode a batch; return states (n, S + 1, ...), log-probs (n, S) and encoded prompts."""
        encoded = self._encode(texts)
        text, shape = self._both(encoded), self.policy.latent_shape()
        storage = getattr(torch, self.one.rollout.storage)
        x = initial_latents(noises, shape).to(self.one.device).to(storage).float()
        states, log_probs = [x], []
        for step in range(len(self.schedule.timesteps)):
            if step not in self.trained:
                v = self._velocity(x, self.schedule.timesteps[step], text)
                x = euler(x, v, *self.schedule.sigmas[step : step + 2])
                continue
            move = self._move(x, step, text)
            noise = path_noise(noises, step, shape).to(self.one.device)
            x = (move.mean + move.std * noise).to(storage).float()
            states.append(x)
            log_probs.append(log_prob(x, move))
        self.policy.decode(x)
        return torch.stack(states, 1), torch.stack(log_probs, 1), *encoded

    def _update(
        self, share: Sequence[Assignment], states: Tensor, log_probs: Tensor, hidden: Tensor, pooled: Tensor
    ) -> float:
        total = 0.0
        for i in range(0, len(share), self.batch):
            part = share[i : i + self.batch]
            rows = [item.trajectory for item in part]
            text = self._both((hidden[rows], pooled[rows]))
            advantages = torch.tensor([item.advantage for item in part], device=states.device)
            for number, step in enumerate(self.trained):
                pair = states[rows, number : number + 2]
                loss = self._loss(pair, step, text, advantages, log_probs[rows, number])
                loss = loss * len(part) / (len(share) * len(self.trained))
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_([p for _, p in self.parameters], self.learner.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _loss(self, states: Tensor, step: int, text: Text, advantages: Tensor, behaviour: Tensor) -> Tensor:
        move = self._move(states[:, 0], step, text)
        with torch.no_grad(), adapter_off(self.transformer):
            reference = self._move(states[:, 0], step, text)
        log_ratio = log_prob(states[:, 1], move) - behaviour
        surrogate, _ = clipped_surrogate(log_ratio, advantages, self.objective.clip)
        kl = gaussian_kl(move, reference)
        return (surrogate + self.objective.beta * kl).mean()


def start_from(loop: PlainLoop, values: Sequence[Any]) -> None:
    """Set the trained parameters, so that a step can be compared with another loop's."""
    with torch.no_grad():
        for (_, parameter), value in zip(loop.parameters, values, strict=True):
            parameter.copy_(value)
