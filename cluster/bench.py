"""Benchmarks: ``python -m cluster.bench overhead|rewards|scale|weights``.

``overhead [PRESET] [--steps N] [--key value ...]`` times a step of the whole service against a bare loop that
does the same maths on the same seeds in one process, without Ray and without DeepSpeed. Both take turns, step
by step, and both start every step from the same weights they would have had alone. ``rewards [--repeats N]``
times OCR (`cluster.bench_rewards`), ``weights [--repeats N]`` full weights to two samplers
(`cluster.bench_weights`), ``scale --cluster.object_store_gb 6`` one driver over simulated samplers
(`cluster.bench_scale`).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cluster import bench_rewards, bench_scale, bench_weights
from cluster.checkpoints import Checkpoints
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.loop import Produced, Run, produce, train_step
from cluster.placement import connect
from cluster.preflight import check
from cluster.process import leave
from cluster.run_folder import RunFolder
from cluster.settings import RunSettings, parse_overrides, resolve
from cluster.solo import load_scorers, score
from cluster.stages import start_stages
from learner.batch import shares
from learner.ema import Ema
from learner.engine import Masters
from learner.loss import clipped_objective
from learner.rows import Rows, rows_of
from rewards.combine import Scores
from rollout.noise import candidate_noises
from rollout.prompts import prompt_at
from rollout.records import Prompt, SampleRequest
from rollout.sampler import transition
from rollout.sde import log_prob
from rollout.worker import RolloutWorker
from selection.selector import Selector

PROG = "python -m cluster.bench"
MEASURES = {
    "rewards": bench_rewards.measure,
    "scale": bench_scale.measure,
    "weights": bench_weights.measure,
}


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
        sampled = {group: self._sample(group) for group in groups}
        scores = [self._score(group, sampled[group][1]) for group in groups]
        selection = self.selector.select(step, list(groups), scores)
        trajectories = {i: sampled[k.group_id][3 + k.candidate] for i, k in enumerate(selection.kept)}
        conditionings = {group: sampled[group][2] for group in groups}
        learner = self.settings.learner
        (plan,) = shares(selection.kept, ranks=1, updates=learner.updates, seed=self.settings.seed, step=step)
        for share in plan:
            self._update(rows_of(share, trajectories, conditionings, learner.advantage_clip, "cpu"))
        return np.stack([score.total for score in scores])

    def _sample(self, group: int) -> tuple[Any, ...]:
        prompt = prompt_at(self.prompts, self.settings.seed, group)
        noises = candidate_noises(self.settings.seed, prompt.index, group, self.settings.selection.candidates)
        request = SampleRequest(group_id=group, prompt=prompt, noises=noises, version=0)
        return self.sampler.sample(request)

    def _score(self, group: int, images: NDArray[np.uint8]) -> Scores:
        prompts = [prompt_at(self.prompts, self.settings.seed, group)] * len(images)
        return score(self.scorers, self.settings.rewards, images, prompts, self.settings.combine)

    def _update(self, rows: Rows) -> None:
        learner, policy = self.settings.learner, self.sampler.policy
        schedule = policy.schedule(self.settings.rollout.steps)
        for part in rows.split(learner.micro_batch):
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
    count = run.settings.groups_per_step
    groups = range(step * count, (step + 1) * count)
    batch = await asyncio.gather(*(produce(run, group, version=step) for group in groups))
    await train_step(run, step, batch, began)
    return batch


def _table(figures: Sequence[tuple[float, float, float]], warmup: int) -> Table:
    timed = figures[warmup:]
    table = Table("", "median", "lowest", "highest", title=f"{len(timed)} steps, {warmup} to warm up")
    columns = [[row[0] for row in timed], [row[1] for row in timed], [a / b for a, b, _ in timed]]
    for name, values, unit in zip(("service", "bare loop", "ratio"), columns, (" s", " s", ""), strict=True):
        cells = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{cell:.3f}{unit}" for cell in cells))
    table.add_row("rewards differ by", f"{figures[0][2]:.1e}", "", f"{max(row[2] for row in figures):.1e}")
    return table


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    parser.add_argument("benchmark", choices=["overhead", *MEASURES])
    parser.add_argument("preset", nargs="?", default="shapes")
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options, rest = parser.parse_known_args(arguments)
    try:
        settings = resolve(options.preset, parse_overrides(rest, PROG))
        connect(settings.cluster)
        if options.benchmark in MEASURES:
            Console().print(MEASURES[options.benchmark](options.repeats))
            return 0
        with tempfile.TemporaryDirectory() as folder:
            figures = asyncio.run(overhead(settings, Path(folder), options.steps))
        Console().print(_table(figures, options.warmup))
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False)
        return 2
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
