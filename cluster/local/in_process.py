"""The stages of a step in one process, without Ray, for studies of many short runs on few cores.

The workers are those of the service, so that a step is the same maths; weights and trajectories are passed by
function calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config.settings import RunSettings
from cluster.local.costs import Clock, Meter
from learner.objectives.registry import load_objective
from learner.rank_shares import rank_updates
from learner.records import Update
from learner.worker import LearnerWorker
from rewards.combine import Scores
from rewards.registry import resolve
from rewards.scorer import Judgement, join
from rewards.settings import RewardSettings
from rewards.spans import Seen, Span, arguments, calls, score_all, seen_of
from rewards.worker import RewardWorker
from rollout.batches import Batch
from rollout.records import CandidateGroup, Chunk, Handle, Keep, Noise, Prompt, Weights, WeightsId
from rollout.worker import RolloutWorker
from selection.records import Selection
from selection.selector import Selector

Scorers = Mapping[str, RewardWorker]


def load_scorers(settings: RunSettings) -> Scorers:
    """Load every reward of training and evaluation once."""
    listed = settings.distinct_rewards
    return {name: RewardWorker(reward.target, reward.options) for name, reward in listed.items()}


def load_sampler(settings: RunSettings, keeps: Collection[Keep] = ()) -> RolloutWorker:
    """Load a sampler as the service does, or one that keeps other fields than the objective needs."""
    wanted = keeps or load_objective(settings.learner.objective).keeps
    return RolloutWorker(settings.model, settings.rollout, settings.seed, keeps=wanted)


def load_learner(settings: RunSettings) -> LearnerWorker:
    """Load a learner as the service does, the only rank of its world."""
    worker = LearnerWorker(
        settings.model, settings.rollout, settings.learner, settings.seed, settings.optimizer_steps
    )
    worker.join_alone()
    return worker


@dataclass(frozen=True, slots=True)
class _LocalReward:
    """A reward in this process, whose failure ends the study instead of biasing it."""

    reward: RewardSettings
    worker: RewardWorker
    clock: Clock

    @property
    def groupwise(self) -> bool:
        return bool(resolve(self.reward.target).traits.groupwise)

    async def score(self, spans: Sequence[Span]) -> Judgement:
        with self.clock.running("score"):
            cut = calls(spans, self.reward.batch, groupwise=self.groupwise)
            return join([self.worker.score_ranges(*arguments(part)) for part in cut])


class LocalRewards:
    """The rewards of a run, combined as configured in training and by their raw values in evaluation."""

    def __init__(self, settings: RunSettings, scorers: Scorers, clock: Clock | None = None) -> None:
        """Score with loaded scorers, whose time is added to a clock."""
        self.rewards = {
            name: _LocalReward(reward, scorers[name], clock or Clock())
            for name, reward in settings.distinct_rewards.items()
        }
        self.training = {reward.name: reward.weight for reward in settings.rewards}
        self.evaluation = {reward.name: reward.weight for reward in settings.eval_rewards_used}
        self.combine = settings.combine

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        """Score a group with every training reward, as its chunks are sampled."""
        seen = [asyncio.ensure_future(seen_of(prompt, chunk)) for chunk in chunks]
        return await score_all(self.rewards, self.training, seen, self.combine)

    async def score_held_out(
        self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]
    ) -> Scores:
        """Score the finite images with every evaluation reward."""
        seen = _done(Seen.of(images, prompts, finite))
        return await score_all(self.rewards, self.evaluation, [seen], "raw")

    def raw(self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]) -> Scores:
        """Score the finite images with every training reward, combined by raw values."""

        async def score() -> Scores:
            seen = _done(Seen.of(images, prompts, finite))
            return await score_all(self.rewards, self.training, [seen], "raw")

        return asyncio.run(score())


def _done(seen: Seen) -> asyncio.Future[Seen]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(seen)
    return future


class LocalStages:
    """Sampler, rewards, selector and learner that alternate, as an implementation of `Stages`.

    The sampler has the learner's current weights or, where the objective lags, its behaviour policy's; during
    an evaluation it has their average.
    """

    def __init__(self, settings: RunSettings, scorers: Scorers) -> None:
        """Load the policy twice, as the service does, for the learner and for the sampler."""
        self.settings = settings
        self.sampler, self.learner = load_sampler(settings), load_learner(settings)
        self.selector = Selector(settings.selection, settings.seed)
        self.clock, self.meter = Clock(), Meter()
        self.rewards = LocalRewards(settings, scorers, self.clock)
        self.weights = WeightsId(0)
        for worker in (self.sampler, self.learner):
            self.meter.count(worker.policy.transformer)

    async def sample(self, batch: Batch) -> Sequence[Chunk]:
        """Sample a batch: a chunk of each of its groups."""
        self._resume()
        with self.clock.running("sample"):
            return self.sampler.sample(batch)

    async def begin(self, batch: Batch) -> Sequence[Chunk]:
        """Draft a batch."""
        self._resume()
        with self.clock.running("sample"):
            return self.sampler.begin(batch)

    async def finish(self, batch: Batch, begun: Sequence[Handle]) -> Sequence[Chunk]:
        """Sample the other steps of partial trajectories."""
        with self.clock.running("sample"):
            return self.sampler.finish(batch, *begun)

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        """Score a group with every training reward."""
        return await self.rewards.score(prompt, chunks)

    async def measure(self, chunks: Sequence[Awaitable[Chunk]]) -> Mapping[str, float]:
        """Return nothing, since only the service has a drift guard."""
        return {}

    async def select(self, step: int, group_ids: Sequence[int], scores: Sequence[Scores]) -> Selection:
        """Keep the candidates that the learner trains on."""
        with self.clock.running("learn"):
            return self.selector.select(step, group_ids, scores)

    async def update(self, step: int, selection: Selection, groups: Sequence[CandidateGroup]) -> Update:
        """Train on the kept candidates."""
        with self.clock.running("learn"):
            (work,) = rank_updates(
                selection.kept, groups,
                ranks=1, updates=self.settings.learner.updates, seed=self.settings.seed, step=step,
                units=self.learner.objective.units(selection.kept),
            )  # fmt: skip
            return self.learner.update(work)

    async def updates(self) -> int:
        """Count the applied optimizer steps."""
        return self.learner.updates

    async def load(self, version: int) -> None:
        """Load the learner's weights into the sampler."""
        self.weights = WeightsId(version)
        self._load(self.weights)

    async def averaged(self, version: int) -> Weights:
        """Load the average of the weights into the sampler, until it samples again."""
        weights = WeightsId(version, averaged=True)
        self._load(weights)
        return Weights(id=weights, checksums=(), parts=())

    async def draw(
        self, weights: Weights, prompts: Sequence[Prompt], noises: Sequence[Noise]
    ) -> tuple[tuple[bool, ...], Handle]:
        """Draw an image per prompt and noise by the ODE; return whether each is finite, and the images."""
        with self.clock.running("draw"):
            return self.sampler.evaluate(prompts, noises)

    async def score_held_out(
        self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]
    ) -> Scores:
        """Score the finite images with every evaluation reward."""
        return await self.rewards.score_held_out(images, prompts, finite)

    async def fetch(self, handle: Handle) -> Any:
        """Return the handle, which is the value itself."""
        return handle

    @property
    def failures(self) -> Sequence[str]:
        """Always empty, since a failing reward raises."""
        return ()

    @property
    def status(self) -> Mapping[str, float]:
        """Always empty, since there are no actors."""
        return {}

    def alarms(self) -> dict[str, str]:
        """Return nothing, since a failing reward raises."""
        return {}

    def _resume(self) -> None:
        """Load the current weights into the sampler again after an evaluation."""
        if self.sampler.holds != self.weights:
            self._load(self.weights)

    def _load(self, weights: WeightsId) -> None:
        with self.clock.running("learn"):
            for number, (digest, flat) in enumerate(self.learner.publish(weights.averaged)):
                assert flat is not None  # the only rank
                self.sampler.load(weights, number, self.learner.parts(), digest, flat)
