"""The stages of the service in one process, without Ray: for studies of many short runs on few cores.

The workers are the service's own, so that a step is the same maths; only what passes weights and
trajectories on is a function call.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.config.settings import RunSettings
from cluster.loop.evaluation import Drawn, eval_means
from cluster.record.nonfinite import BROKEN, EVAL_BROKEN
from learner.rank_shares import shares
from learner.worker import LearnerWorker
from rewards.combine import Scores, combine
from rewards.scorer import missing, spread
from rewards.settings import Combination, RewardSettings
from rewards.worker import RewardWorker
from rollout.noise import candidate_noises
from rollout.prompts import prompt_at
from rollout.records import Conditioning, Prompt, SampleRequest, Trajectory
from rollout.worker import RolloutWorker
from selection.records import Kept
from selection.selector import Selector, screen

Scorers = Mapping[str, RewardWorker]
Sampled = tuple[NDArray[np.uint8], Sequence[bool], Conditioning, list[Trajectory]]
"""The images of a group, which of them are finite, the conditioning and the trajectories."""


class Meter:
    """Counts what passes through transformers: rows forward, and rows that a backward pass follows."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def watch(self, transformer: torch.nn.Module) -> None:
        """Count this model's passes too; a guided image is two rows."""
        transformer.register_forward_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        rows = len(output[0])
        self.forwards += rows
        self.backwards += rows * torch.is_grad_enabled()


class Stopwatch:
    """Seconds since the last reading, of the wall clock and of this process's CPU time."""

    def __init__(self) -> None:
        self.last = self._now()

    def lap(self, stage: str) -> dict[str, float]:
        """Name the readings ``seconds_STAGE`` and ``cpu_seconds_STAGE``, and start again."""
        then, self.last = self.last, self._now()
        wall, cpu = (now - before for now, before in zip(self.last, then, strict=True))
        return {f"seconds_{stage}": wall, f"cpu_seconds_{stage}": cpu}

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def load_scorers(settings: RunSettings) -> Scorers:
    """Every reward of training and evaluation, loaded once."""
    listed = settings.distinct_rewards
    return {name: RewardWorker(reward.target, reward.options) for name, reward in listed.items()}


def score(
    scorers: Scorers,
    rewards: Sequence[RewardSettings],
    images: NDArray[np.uint8],
    prompts: Sequence[Prompt],
    how: Combination = "raw",
    *,
    finite: Sequence[bool],
) -> Scores:
    """All the given rewards of N images, combined; those that are not ``finite`` have none.

    A reward that fails ends the study rather than bend it.
    """
    seen = np.flatnonzero(finite)
    asked = [prompts[place] for place in seen]
    judgements = {
        reward.name: scorers[reward.name].score(images[seen], asked) if asked else missing(0)
        for reward in rewards
    }
    whole = {name: spread(judgement, finite) for name, judgement in judgements.items()}
    return combine(whole, {reward.name: reward.weight for reward in rewards}, how)


class Solo:
    """One run: a sampler, the rewards, a selector and a learner that take turns."""

    def __init__(self, settings: RunSettings, prompts: tuple[Prompt, ...], scorers: Scorers) -> None:
        """Load the policy twice, as the service does: the learner's copy and the sampler's."""
        self.settings, self.prompts, self.scorers = settings, prompts, scorers
        self.sampler = RolloutWorker(
            settings.model, settings.rollout, settings.seed, keep_means=settings.learner.needs_means
        )
        self.learner = LearnerWorker(
            settings.model, settings.rollout, settings.learner, settings.seed, settings.optimizer_steps
        )
        self.learner.join(0, 1, "127.0.0.1", 0)
        self.selector = Selector(settings.selection, settings.seed)
        self.meter = Meter()
        for worker in (self.sampler, self.learner):
            self.meter.watch(worker.policy.transformer)
        self._hand_over(0)

    def step(self, step: int, groups: Sequence[int]) -> dict[str, float]:
        """One training step on the given groups: its metrics, its counts and its seconds.

        Counts are rows of the transformer (``forwards``, ``backwards``), images (``sampled``, ``decodes``,
        ``trained``) and images times rewards (``scores``).
        """
        watch, before = Stopwatch(), (self.meter.forwards, self.meter.backwards)
        prompts = [prompt_at(self.prompts, self.settings.seed, group) for group in groups]
        sampled = self._sample(step, groups, prompts)
        costs = watch.lap("sample")
        rewards = self.settings.rewards
        scores = [
            score(self.scorers, rewards, images, [prompt] * len(images), self.settings.combine, finite=finite)
            for (images, finite, _, _), prompt in zip(sampled, prompts, strict=True)
        ]
        costs |= watch.lap("score")
        selection = self.selector.select(step, groups, scores)
        by_group = dict(zip(groups, sampled, strict=True))
        learnt = self._update(step, selection.kept, by_group) if selection.kept else {}
        self._hand_over(step + 1)
        count = sum(len(images) for images, *_ in sampled)
        looked_at = count + len(groups) * self.settings.selection.previews
        return {
            **learnt,
            **selection.metrics,
            **costs,
            **watch.lap("learn"),
            BROKEN: sum(not good for _, finite, *_ in sampled for good in finite),
            "sampled": count,
            "trained": len(selection.kept),
            "forwards": self.meter.forwards - before[0],
            "backwards": self.meter.backwards - before[1],
            "decodes": looked_at,
            "scores": looked_at * len(rewards),
        }

    def evaluate(self, step: int, drawn: Sequence[Drawn]) -> dict[str, float]:
        """The eval_* figures of held-out prompts on fixed noise, by the ODE under averaged weights."""
        watch = Stopwatch()
        self._hand_over(step, averaged=True)
        prompts = [prompt for prompt, _, _ in drawn]
        finite, images = self.sampler.evaluate(prompts, [noise for _, _, noise in drawn])
        self._hand_over(step)
        scores = score(self.scorers, self.settings.judges, images, prompts, finite=finite)
        seen = np.flatnonzero(finite)
        return {
            **eval_means(scores),
            "eval_diversity": diversity(images[seen], [prompts[place] for place in seen]),
            EVAL_BROKEN: len(drawn) - len(seen),
            **watch.lap("eval"),
        }

    def _sample(self, step: int, groups: Sequence[int], prompts: Sequence[Prompt]) -> list[Sampled]:
        """Every group; with previews, each by itself, and only the candidates that promise most."""
        settings = self.settings
        count = settings.selection.previews or settings.selection.candidates
        requests = [
            SampleRequest(
                group_id=group, prompt=prompt, version=step,
                noises=candidate_noises(settings.seed, prompt.index, group, count, settings.rollout),
            )
            for group, prompt in zip(groups, prompts, strict=True)
        ]  # fmt: skip
        if settings.selection.previews:
            return [self._screened(request) for request in requests]
        told, *made = self.sampler.sample(requests)
        parts = len(requests)
        images, conditionings, trajectories = made[:parts], made[parts : 2 * parts], made[2 * parts :]
        own = [slice(i * count, (i + 1) * count) for i in range(parts)]
        return [
            (images[i], told.finite[rows], conditionings[i], trajectories[rows]) for i, rows in enumerate(own)
        ]

    def _screened(self, request: SampleRequest) -> Sampled:
        """Begin every candidate and finish those whose previews differ most, as in the service."""
        settings, prompts = self.settings, [request.prompt] * len(request.noises)
        told, previews, *begun = self.sampler.begin(request)
        scores = score(
            self.scorers, settings.rewards, previews, prompts, settings.combine, finite=told.finite
        )
        chosen = screen(scores, settings.selection, settings.seed, request.group_id)
        request = replace(request, noises=tuple(request.noises[i] for i in chosen))
        told, images, conditioning, *trajectories = self.sampler.finish(request, *(begun[i] for i in chosen))
        return images, told.finite, conditioning, trajectories

    def _update(self, step: int, kept: Sequence[Kept], sampled: Mapping[int, Sampled]) -> dict[str, float]:
        updates = self.settings.learner.updates
        (mine,) = shares(kept, ranks=1, updates=updates, seed=self.settings.seed, step=step)
        owners = sorted({one.group_id for one in kept})
        trajectories = [sampled[one.group_id][3][one.candidate] for one in kept]
        found = self.learner.update(mine, owners, *(sampled[g][2] for g in owners), *trajectories)
        return {name: value for name, value in found.metrics.items() if "." not in name}

    def _hand_over(self, version: int, averaged: bool = False) -> None:
        for number, (digest, flat) in enumerate(self.learner.publish(averaged)):
            assert flat is not None  # the only rank
            self.sampler.load(version, number, self.learner.parts(), digest, flat)


def diversity(images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> float:
    """How much images of one prompt differ: the root mean squared deviation of a pixel, in [0, 1].

    NaN where every prompt has one image. A policy that collapses to one picture per prompt shows here.
    """
    numbers = np.array([prompt.index for prompt in prompts])
    scaled = images.astype(np.float64) / 255
    spreads = [
        scaled[numbers == n].var(0, ddof=1).mean() for n in np.unique(numbers) if (numbers == n).sum() > 1
    ]
    return float(np.sqrt(np.mean(spreads))) if spreads else float("nan")
