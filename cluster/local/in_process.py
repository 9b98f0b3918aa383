"""The stages of a step in one process, without Ray: for studies of many short runs on few cores.

The workers are the service's own, so that a step is the same maths; what passes weights and trajectories on
is a function call.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Mapping, Sequence
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
from rollout.records import CandidateGroup, Chunk, Handle, Noise, Prompt, Weights, WeightsId
from rollout.worker import RolloutWorker
from selection.records import Selection
from selection.selector import Selector

Scorers = Mapping[str, RewardWorker]


def load_scorers(settings: RunSettings) -> Scorers:
    """Load every reward of training and evaluation once."""
    listed = settings.distinct_rewards
    return {name: RewardWorker(reward.target, reward.options) for name, reward in listed.items()}


def load_sampler(settings: RunSettings) -> RolloutWorker:
    """Load a sampler as the service does."""
    keeps = load_objective(settings.learner.objective).keeps
    return RolloutWorker(settings.model, settings.rollout, settings.seed, keeps=keeps)


def load_learner(settings: RunSettings) -> LearnerWorker:
    """Load a learner as the service does, the only rank of its world."""
    worker = LearnerWorker(
        settings.model, settings.rollout, settings.learner, settings.seed, settings.optimizer_steps
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    worker.join(0, 1, "127.0.0.1", port)
    return worker


@dataclass(frozen=True, slots=True)
class _Judge:
    """A reward in this process; one that fails ends the study rather than bend it."""

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
    """The rewards of a run; those of training add up as the run says, those of an evaluation as they are."""

    def __init__(self, settings: RunSettings, scorers: Scorers, clock: Clock | None = None) -> None:
        """Score with scorers that are loaded; their time is added to a clock."""
        self.judges = {
            name: _Judge(reward, scorers[name], clock or Clock())
            for name, reward in settings.distinct_rewards.items()
        }
        self.training = {reward.name: reward.weight for reward in settings.rewards}
        self.judging = {reward.name: reward.weight for reward in settings.judges}
        self.combine = settings.combine

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        """Score a group with every training reward, as its chunks are sampled."""
        seen = [asyncio.ensure_future(seen_of(prompt, chunk)) for chunk in chunks]
        return await score_all(self.judges, self.training, seen, self.combine)

    async def judge(self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]) -> Scores:
        """Score images that are finite with every evaluation reward."""
        return await score_all(self.judges, self.judging, [_done(Seen.of(images, prompts, finite))], "raw")

    def raw(self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]) -> Scores:
        """Score images that are finite with every training reward, which add up as they are."""

        async def score() -> Scores:
            seen = _done(Seen.of(images, prompts, finite))
            return await score_all(self.judges, self.training, [seen], "raw")

        return asyncio.run(score())


def _done(seen: Seen) -> asyncio.Future[Seen]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(seen)
    return future


class LocalStages:
    """A sampler, the rewards, a selector and a learner that take turns, as `cluster.loop.stages.Stages`.

    Always on-policy: the sampler has the learner's weights, or its average for as long as an evaluation.
    """

    def __init__(self, settings: RunSettings, scorers: Scorers) -> None:
        """Load the policy twice, as the service does: the learner's copy and the sampler's."""
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
        """Sample the first steps of a batch."""
        self._resume()
        with self.clock.running("sample"):
            return self.sampler.begin(batch)

    async def finish(self, batch: Batch, begun: Sequence[Handle]) -> Sequence[Chunk]:
        """Sample the other steps of candidates that were begun."""
        with self.clock.running("sample"):
            return self.sampler.finish(batch, *begun)

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        """Score a group with every training reward."""
        return await self.rewards.score(prompt, chunks)

    async def measure(self, chunks: Sequence[Awaitable[Chunk]]) -> Mapping[str, float]:
        """Measure nothing: no drift guard watches here."""
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
        """Count the optimizer steps that were applied."""
        return self.learner.updates

    async def load(self, version: int) -> None:
        """Hand the learner's weights over to the sampler."""
        self.weights = WeightsId(version)
        self._hand_over(self.weights)

    async def averaged(self, version: int) -> Weights:
        """Hand the average of the weights over to the sampler, which gives it back before it next samples."""
        weights = WeightsId(version, averaged=True)
        self._hand_over(weights)
        return Weights(id=weights, checksums=(), parts=())

    async def draw(
        self, weights: Weights, prompts: Sequence[Prompt], noises: Sequence[Noise]
    ) -> tuple[tuple[bool, ...], Handle]:
        """Draw an image for every prompt and noise by the ODE: which are finite, and all of them."""
        with self.clock.running("draw"):
            return self.sampler.evaluate(prompts, noises)

    async def judge(self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]) -> Scores:
        """Score images that are finite with every evaluation reward."""
        return await self.rewards.judge(images, prompts, finite)

    async def fetch(self, handle: Handle) -> Any:
        """Return the value, which is here already."""
        return handle

    @property
    def failures(self) -> Sequence[str]:
        """Nothing: a reward that fails raises."""
        return ()

    @property
    def status(self) -> Mapping[str, float]:
        """Nothing: there are no actors."""
        return {}

    def alarms(self) -> dict[str, str]:
        """Return nothing: no reward only watches here."""
        return {}

    def _resume(self) -> None:
        """Give the sampler the policy back after an evaluation."""
        if self.sampler.holds != self.weights:
            self._hand_over(self.weights)

    def _hand_over(self, weights: WeightsId) -> None:
        with self.clock.running("learn"):
            for number, (digest, flat) in enumerate(self.learner.publish(weights.averaged)):
                assert flat is not None  # the only rank
                self.sampler.load(weights, number, self.learner.parts(), digest, flat)
