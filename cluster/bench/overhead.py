"""A step of the whole service against a bare loop of the same maths on the same seeds.

The loop is one process without Ray and without DeepSpeed. Both take turns, step by step, and both start
every step from the weights they would have had alone. Every key of the configuration can be overridden.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from cluster.actors.actor_spec import connect
from cluster.actors.stages import start_stages
from cluster.bench.table import Report, Row
from cluster.config.errors import UserError
from cluster.config.preflight import check
from cluster.config.settings import RunSettings, parse_overrides, resolve
from cluster.local.in_process import load_scorers, score
from cluster.loop.drift_guard import Guard
from cluster.loop.loop import Produced, Run, admit, train_step
from cluster.record.checkpoints import Checkpoints
from cluster.record.run_folder import RunFolder
from learner.ema import Ema
from learner.engine import Masters
from learner.loss import clipped_objective
from learner.minibatch import Rows, rows_of
from learner.rank_shares import shares
from rewards.combine import Scores
from rollout.noise import candidate_noises
from rollout.prompts import prompt_at
from rollout.records import Prompt, SampleRequest
from rollout.sampler import transition
from rollout.sde import log_prob
from rollout.worker import RolloutWorker
from selection.selector import Selector

PROG = "python -m cluster.bench overhead"


class BareLoop:
    """FlowGRPO with margin selection in one process: what the service's step is measured against."""

    def __init__(self, settings: RunSettings, prompts: tuple[Prompt, ...]) -> None:
        """Load one policy that both samples and learns."""
        if settings.model.lora_rank or settings.learner.beta:
            raise UserError("bench overhead: the bare loop trains all parameters and has no KL term")
        self.settings, self.prompts = settings, prompts
        self.sampler = RolloutWorker(settings.model, settings.rollout, settings.seed)
        torch.set_num_threads(settings.learner.threads)
        self.scorers = load_scorers(settings)
        self.selector = Selector(settings.selection, settings.seed)
        self.model = self.sampler.policy.transformer.requires_grad_(True)
        self.sampler.version = 0
        learner = settings.learner
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=learner.learning_rate,
            betas=learner.betas,
            weight_decay=learner.weight_decay,
        )
        self.ema = Ema(
            list(self.model.named_parameters()), Masters(0, 1), learner.ema_decay, learner.ema_every
        )
        self.updates = 0

    def step(self, step: int) -> NDArray[np.float64]:
        """One training step; returns all rewards (groups, candidates)."""
        count = self.settings.groups_per_step
        groups = range(step * count, (step + 1) * count)
        requests = [self._request(group) for group in groups]
        made, *sampled = self.sampler.sample(requests)
        images, found, paths = sampled[:count], sampled[count : 2 * count], sampled[2 * count :]
        each = self.settings.selection.candidates
        finite = [made.finite[i : i + each] for i in range(0, count * each, each)]
        scores = [self._score(*one) for one in zip(groups, images, finite, strict=True)]
        selection = self.selector.select(step, list(groups), scores)
        trajectories = {
            i: paths[groups.index(k.group_id) * each + k.candidate] for i, k in enumerate(selection.kept)
        }
        conditionings = dict(zip(groups, found, strict=True))
        learner = self.settings.learner
        (plan,) = shares(selection.kept, ranks=1, updates=learner.updates, seed=self.settings.seed, step=step)
        for share in plan:
            self._update(rows_of(share, trajectories, conditionings, learner.advantage_clip, "cpu"))
        return np.stack([score.total for score in scores])

    def _request(self, group: int) -> SampleRequest:
        prompt = prompt_at(self.prompts, self.settings.seed, group)
        noises = candidate_noises(self.settings.seed, prompt.index, group, self.settings.selection.candidates)
        return SampleRequest(group_id=group, prompt=prompt, noises=noises, version=0)

    def _score(self, group: int, images: NDArray[np.uint8], finite: Sequence[bool]) -> Scores:
        prompts = [prompt_at(self.prompts, self.settings.seed, group)] * len(images)
        rewards, how = self.settings.rewards, self.settings.combine
        return score(self.scorers, rewards, images, prompts, how, finite=finite)

    def _update(self, rows: Rows) -> None:
        learner, policy = self.settings.learner, self.sampler.policy
        schedule = policy.schedule(self.settings.rollout.steps)
        for part in rows.split(learner.pairs(policy.tokens)):
            pair = schedule.sigmas[part.steps], schedule.sigmas[part.steps + 1]
            timestep = schedule.timesteps[part.steps]
            move = transition(
                policy, self.settings.rollout, self.model, part.states, part.conditioning, pair, timestep
            )
            log_ratio = log_prob(part.next_states, move) - part.log_probs
            surrogate, _ = clipped_objective(log_ratio, part.advantages, learner.clip)
            (part.weights * surrogate).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), learner.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.ema.step(self.updates)


async def overhead(settings: RunSettings, folder: Path, steps: int) -> list[tuple[float, float, float]]:
    """Per step: seconds of the service, seconds of the bare loop, and the largest reward difference."""
    inputs = check(settings)
    bare = BareLoop(settings, inputs.train)
    stages, guard = start_stages(settings), Guard(settings.guard, [])
    await stages.ready()
    checkpoints = Checkpoints(str(folder), 1)
    run = Run(settings, RunFolder(folder), inputs.train, [], stages, checkpoints, (), guard)
    await stages.rollouts.load(await stages.learner.publish(0))
    figures = []
    for step in range(steps):
        began = time.perf_counter()
        batch = await _service_step(run, step)
        served = time.perf_counter()
        rewards = bare.step(step)
        done = time.perf_counter()
        difference = np.abs(np.stack([one.scores.total for one in batch]) - rewards).max()
        figures.append((served - began, done - served, float(difference)))
    return figures


async def _service_step(run: Run, step: int) -> Sequence[Produced]:
    began = time.perf_counter()
    batch = await asyncio.gather(*admit(run, step, version=step))
    await train_step(run, step, batch, began)
    return batch


def options(parser: argparse.ArgumentParser) -> None:
    """What can be said about it."""
    parser.add_argument("preset", nargs="?", default="shapes")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")


def measure(options: argparse.Namespace, rest: Sequence[str]) -> Report:
    """Start the service and the loop, and let them take turns.

    Raises:
        UserError: if the configuration is wrong, or not one that the bare loop can follow.
    """
    settings = resolve(options.preset, parse_overrides(list(rest), PROG))
    connect(settings.cluster)
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = asyncio.run(overhead(settings, Path(folder), options.warmup + options.repeats))
    finally:
        ray.shutdown()
    timed = figures[options.warmup :]
    return Report(
        f"{len(timed)} steps of {options.preset}, {options.warmup} to warm up",
        [
            Row("service (s)", [a for a, _, _ in timed], 3),
            Row("bare loop (s)", [b for _, b, _ in timed], 3),
            Row("service / bare loop", [a / b for a, b, _ in timed]),
            Row("rewards of the first step differ by", [figures[0][2]], 8),
            Row("rewards differ by, at most", [max(row[2] for row in figures)], 8),
        ],
    )
