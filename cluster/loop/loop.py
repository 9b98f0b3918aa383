"""The training loop: oversample the noise, score, keep the widest margins, update, broadcast."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Final

import numpy as np
from ray.exceptions import ObjectLostError

from cluster.actors.stages import Stages
from cluster.config.settings import RunSettings
from cluster.loop.checks import RunStopped, check_images, check_margins, check_weights
from cluster.loop.drift_guard import Guard, Observer, image_metrics
from cluster.loop.evaluation import Drawn, evaluate
from cluster.loop.shared_batches import Batches
from cluster.record.checkpoints import Checkpoints
from cluster.record.events import GROUP, STEP
from cluster.record.nonfinite import BROKEN, Named, broken_candidates
from cluster.record.run_folder import RunFolder
from learner.records import Update
from rewards.combine import Scores
from rollout.prompts import prompt_at
from rollout.records import CandidateGroup, Chunk, Prompt, SampleRequest
from selection.records import Selection
from selection.selector import screen

PAIRS_SHOWN: Final = 4
RATIO_TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far an on-policy ratio may be from one before the sampler and the learner count as different."""
LEARNER_METRICS: Final = (
    "loss", "ratio_mean", "ratio_max_deviation", "drift", "clip_fraction", "kl", "advantage_rms", "pull",
    "grad_norm", "learning_rate", "skipped_updates", "skipped_in_a_row", "seconds_learn",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Produced:
    """A scored group, statistics of its images, and when it was sampled and scored (`time.perf_counter`).

    ``broken`` names its images that are not finite, and the previews for which a candidate was left out.
    """

    group: CandidateGroup
    scores: Scores
    observed: Mapping[str, float]
    sampled: float
    scored: float
    broken: Sequence[Named] = ()


@dataclass(slots=True)
class Run:
    """What the loop works with; setting ``stop`` ends it after the current step."""

    settings: RunSettings
    folder: RunFolder
    prompts: tuple[Prompt, ...]
    drawn: list[Drawn]
    stages: Stages
    checkpoints: Checkpoints
    trackers: Sequence[Callable[[dict[str, Any]], None]]
    guard: Guard
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    empty_batches: int = 0
    updates: int = 0
    """Optimizer steps that were ever applied, also before the run was resumed."""

    def track(self, metrics: dict[str, Any]) -> None:
        """Hand a line of metrics to everyone who keeps or shows it."""
        for tracker in self.trackers:
            tracker(metrics)


async def train(run: Run, start: int) -> int:
    """Train from a step to the last one; returns the number of steps done when it ends or is stopped."""
    settings, stages = run.settings, run.stages
    inflight: deque[list[asyncio.Task[Produced]]] = deque()
    ahead = iter(range(start, settings.steps))
    run.updates = await stages.learner.updates()
    await stages.rollouts.load(await stages.learner.publish(start))
    if start == 0:
        metrics: dict[str, Any] = {"step": 0, **await _evaluation(run, 0)}
        run.guard.look(metrics)
        _alarm(metrics, run.stages.rewards.alarms())
        run.track(metrics)
    step = start
    async with asyncio.TaskGroup() as producers:
        while step < settings.steps:
            began = time.perf_counter()
            STEP.set(step + 1)
            for admitted in islice(ahead, settings.max_staleness + 1 - len(inflight)):
                groups = admit(run, admitted, version=step)
                inflight.append([producers.create_task(group) for group in groups])
            batch = [await group for group in inflight.popleft()]
            metrics = await train_step(run, step, batch, began)
            step += 1
            await _conclude(run, step, metrics)
            if run.stop.is_set():  # only here, so that a stop always finds its checkpoint
                break
        for task in chain(*inflight):
            task.cancel()
    return step


def admit(run: Run, step: int, *, version: int) -> list[Coroutine[Any, Any, Produced]]:
    """The groups of a step, each to be produced under a policy version; neighbours may share a batch."""
    settings, rollouts = run.settings, run.stages.rollouts
    count = settings.groups_per_step
    requests = [
        rollouts.request(prompt_at(run.prompts, settings.seed, group_id), group_id, version=version)
        for group_id in range(step * count, (step + 1) * count)
    ]
    batches = Batches(rollouts.batches(requests), rollouts.sample)
    return [produce(run, request, batches) for request in requests]


async def produce(run: Run, request: SampleRequest, batches: Batches) -> Produced:
    """One group: oversample its noise, and score every candidate with every reward as they come.

    If a node takes images with it before they are scored, the group is made once more, as it was.
    """
    GROUP.set(request.group_id)
    try:
        return await _produce(run, request, batches)
    except ObjectLostError:
        batches.lose(request.group_id)
        return await _produce(run, request, batches)


async def _produce(run: Run, request: SampleRequest, batches: Batches) -> Produced:
    if run.settings.selection.previews:
        finishing = await _screened(run, request)
    else:
        finishing = _Finishing(request, batches.chunks(request.group_id))
    request, chunks = finishing.request, finishing.chunks
    scoring = run.stages.rewards.score(request.prompt, chunks)
    (group, sampled), (scores, scored), observed = await asyncio.gather(
        _sampled(request, chunks, finishing.spent), _timed(scoring), _observed(run.stages.observer, chunks)
    )
    finite = [good for chunk in chunks for good in chunk.result().finite]
    found = [*finishing.broken, *broken_candidates(request, finite)]
    return Produced(group, scores, observed, sampled, scored, found)


@dataclass(frozen=True, slots=True)
class _Finishing:
    """The candidates of a group that are sampled to the end; ``spent`` seconds came before.

    ``broken`` names the previews that are not finite, of candidates that were therefore left out.
    """

    request: SampleRequest
    chunks: Sequence[asyncio.Future[Chunk]]
    spent: float = 0.0
    broken: Sequence[Named] = ()


async def _screened(run: Run, request: SampleRequest) -> _Finishing:
    """Begin every candidate and finish those that promise most."""
    rollouts, selection = run.stages.rollouts, run.settings.selection
    previews = [asyncio.ensure_future(rollouts.begin(part)) for (part,) in rollouts.batches([request])]
    scores = await run.stages.rewards.score(request.prompt, previews)
    done = [preview.result() for preview in previews]
    begun = [handle for preview in done for handle in preview.trajectories]
    chosen = screen(scores, selection, run.settings.seed, request.group_id)
    finite = [good for preview in done for good in preview.finite]
    harmless = [good or place in chosen for place, good in enumerate(finite)]
    left_out = broken_candidates(request, harmless, "preview")
    request = replace(request, noises=tuple(request.noises[i] for i in chosen))
    handles = iter([begun[i] for i in chosen])
    chunks = [
        asyncio.ensure_future(rollouts.finish(part, tuple(islice(handles, len(part.noises)))))
        for (part,) in rollouts.batches([request])
    ]
    return _Finishing(request, chunks, sum(preview.seconds for preview in done), left_out)


async def _timed(scoring: Awaitable[Scores]) -> tuple[Scores, float]:
    return await scoring, time.perf_counter()


async def _observed(
    observer: Observer | None, chunks: Sequence[asyncio.Future[Chunk]]
) -> Mapping[str, float]:
    return await observer.measure(chunks) if observer else {}


async def _sampled(
    request: SampleRequest, chunks: Sequence[asyncio.Future[Chunk]], spent: float
) -> tuple[CandidateGroup, float]:
    """The chunks of a group as one, and when the last of them was done; ``spent`` seconds came before."""
    done = await asyncio.gather(*chunks)
    group = CandidateGroup(
        group_id=request.group_id,
        prompt=request.prompt,
        version=request.version,
        noises=request.noises,
        images=tuple(chunk.images for chunk in done),
        conditioning=done[0].conditioning,
        trajectories=tuple(handle for chunk in done for handle in chunk.trajectories),
        seconds=spent + sum(chunk.seconds for chunk in done),
    )
    return group, time.perf_counter()


async def train_step(run: Run, step: int, batch: Sequence[Produced], began: float) -> dict[str, Any]:
    """Select, update, broadcast; the metrics of all three. The step is counted from one in the record."""
    groups, scores = [one.group for one in batch], [one.scores for one in batch]
    sampled, scored = max(one.sampled for one in batch), max(one.scored for one in batch)
    ready = time.perf_counter()
    selection = await run.stages.selector.select(step, [g.group_id for g in groups], scores)
    selected = time.perf_counter()
    found = [named for one in batch for named in one.broken]
    await asyncio.to_thread(run.folder.record_broken, step + 1, found)
    update = await _update(run, step, selection, groups, found)
    updated = time.perf_counter()
    await run.stages.rollouts.load(await run.stages.learner.publish(step + 1))
    done = time.perf_counter()
    await asyncio.to_thread(run.folder.record, step + 1, groups, scores, selection)
    await _save_pairs(run, step + 1, groups, selection)
    return {
        "step": step + 1,
        "policy_version": step,
        "staleness": step - min(group.version for group in groups),
        **selection.metrics,
        BROKEN: len(found),
        **update,
        "updates": run.updates,
        **image_metrics([one.observed for one in batch]),
        # What of sampling and scoring the step had to wait for: the rest hid behind the last update.
        "seconds_sample": max(0.0, sampled - began),
        "seconds_score": max(0.0, scored - max(sampled, began)),
        "seconds_select": selected - ready,
        "seconds_learn": updated - selected,
        "seconds_broadcast": done - updated,
        "seconds_step": time.perf_counter() - began,
        "restarts": run.stages.restarts,
        "samplers": run.stages.samplers,
    }


async def _update(
    run: Run,
    step: int,
    selection: Selection,
    groups: Sequence[CandidateGroup],
    found: Sequence[Named],
) -> dict[str, Any]:
    check_images(run, groups, found)
    _check_rewards(run, selection)
    if not selection.kept:
        run.empty_batches += 1
        check_margins(run, {"step": step + 1, **selection.metrics, BROKEN: len(found)})
        return dict.fromkeys(LEARNER_METRICS)
    run.empty_batches = 0
    update = await run.stages.learner.update(step, selection, groups)
    run.updates = int(update.metrics["updates"])
    check_weights(run, update)
    await _check_finite(run, step, selection, groups, update)
    _check_on_policy(run, step, groups, update.metrics)
    return dict(update.metrics)


async def _check_finite(
    run: Run, step: int, selection: Selection, groups: Sequence[CandidateGroup], update: Update
) -> None:
    """Keep the evidence of a skipped update; too many in a row, and there is nothing left to learn."""
    if not update.metrics["skipped_updates"]:
        return
    suspects = [selection.kept[number] for number in update.suspects]
    await asyncio.to_thread(run.folder.record_nonfinite, step + 1, groups, suspects)
    if update.metrics["skipped_in_a_row"] >= run.settings.learner.max_skipped:
        raise RunStopped(
            f"{update.metrics['skipped_in_a_row']:.0f} optimizer steps in a row had a gradient that is not "
            f"finite; what led to it is in {run.folder.nonfinite}"
        )


def _check_rewards(run: Run, selection: Selection) -> None:
    if selection.metrics["valid"] == 0 and run.stages.rewards.failures:
        raise RunStopped("; ".join(run.stages.rewards.failures))


def _check_on_policy(
    run: Run, step: int, groups: Sequence[CandidateGroup], update: Mapping[str, float]
) -> None:
    """Right after the start nothing is stale, so a ratio other than one is a defect and not a fact."""
    fresh = step == min(group.version for group in groups)
    tolerance = RATIO_TOLERANCE[run.settings.model.dtype]
    if fresh and update["ratio_max_deviation"] > tolerance:
        raise RunStopped(
            f"sampler and learner disagree: on-policy ratios are off by {update['ratio_max_deviation']:.2g}, "
            f"more than {tolerance:g} in {run.settings.model.dtype}"
        )


async def _save_pairs(run: Run, step: int, groups: Sequence[CandidateGroup], selection: Selection) -> None:
    """Keep the widest pairs of some steps as images: of the first, the last and every few between."""
    settings = run.settings
    if step not in (1, settings.steps) and step % settings.image_every:
        return
    by_id = {group.group_id: group for group in groups}
    widest = sorted(selection.groups, key=lambda g: -g.margin)[:PAIRS_SHOWN]
    for statistics in widest:
        kept = [k.candidate for k in selection.kept if k.group_id == statistics.group_id]
        if len(kept) >= 2:
            images = np.concatenate([await chunk for chunk in by_id[statistics.group_id].images])
            pair = (kept[0], kept[-1])
            await asyncio.to_thread(run.folder.save_pair, step, statistics.group_id, images, pair)


async def _conclude(run: Run, step: int, metrics: dict[str, Any]) -> None:
    """Evaluate, checkpoint and log, where they are due; the last step and a stop get all of them."""
    settings = run.settings
    last = step == settings.steps
    if last or step % settings.eval_every == 0:
        metrics |= await _evaluation(run, step)
    drifted = run.guard.look(metrics)
    if drifted and settings.guard.action == "pause":
        run.stop.set()
    _alarm(metrics, drifted | run.stages.rewards.alarms())
    run.track(metrics)
    ends = last or run.stop.is_set()
    if ends or step % settings.checkpoint_every == 0:
        await run.checkpoints.commit(step, run.stages.learner, empty_batches=run.empty_batches)
    await run.checkpoints.settle(run.stages.learner, wait=ends)


def _alarm(metrics: dict[str, Any], alarms: dict[str, str]) -> None:
    """Add alarms to a step's metrics, where everyone looks for them."""
    if alarms:
        metrics["alarms"] = alarms


async def _evaluation(run: Run, step: int) -> dict[str, float]:
    run.stages.rewards.try_again()
    weights = await run.stages.learner.publish(step, averaged=True)
    return await evaluate(run.stages, run.folder, step, run.drawn, weights, run.settings.rollout.batch)
