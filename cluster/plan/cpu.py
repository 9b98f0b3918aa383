"""Estimate a run on this machine's CPUs from measurements of each role's work."""

from __future__ import annotations

from typing import Final

import numpy as np
import psutil

from cluster.config.preflight import check, processes
from cluster.config.settings import RunSettings
from cluster.plan import measure
from cluster.plan.estimate import Estimate, Need
from cluster.plan.measure import Measured, alone
from cluster.plan.step import sampling_passes

SERVICE: Final = 0.05
"""Seconds per step of Ray, selection, broadcast and records, as measured on the bundled presets."""
OTHERS: Final = 0.62e9
"""Bytes of Ray's own processes and of the driver, as measured on the bundled presets."""
LIGHT: Final = 0.13e9
"""Bytes of the selector and of the observer of images, each."""
LIBRARIES: Final = 0.4e9
"""Bytes of shared libraries, of which all processes have one copy."""


def estimate(settings: RunSettings) -> Estimate:
    """Estimate the memory of all processes and the seconds per step.

    Raises:
        UserError: if the configuration cannot be run.
    """
    prompt = check(settings).train[0]
    sampler = alone(measure.sampler, settings, prompt)
    images = np.concatenate([chunk.images for chunk in sampler.output])
    scorers = {
        name: alone(measure.reward, reward, images, prompt)
        for name, reward in settings.distinct_rewards.items()
    }
    learner = alone(measure.learner, settings, prompt, sampler.output)
    cores = psutil.cpu_count() or 1
    basis = f"{measure.REPEATS - 1} measurements of each role's work on {cores} cores"
    sampled = settings.groups_per_step * settings.selection.candidates * settings.rollout.steps
    batches = len(measure.step_batches(settings, prompt)) * sampling_passes(settings) / sampled
    stages = _stages(settings, batches, sampler, scorers, learner, cores)
    return Estimate(stages, (_need(settings, sampler, scorers, learner),), settings.max_staleness > 0, basis)


def _stages(
    settings: RunSettings,
    batches: float,
    sampler: Measured,
    scorers: dict[str, Measured],
    learner: Measured,
    cores: int,
) -> dict[str, float]:
    rollout = settings.rollout
    score = sum(scorers[reward.name].seconds for reward in settings.rewards)
    slowest = max(scorers[reward.name].seconds / reward.workers for reward in settings.rewards)
    # Samplers and replicas overlap, so the time is that of the slowest, or of all their work on the cores.
    sampling = -(-batches // rollout.workers) * sampler.seconds + slowest
    busy = batches * (sampler.seconds * rollout.threads + score) / cores
    crowd = max(1.0, settings.learner.ranks * settings.learner.threads / cores)
    return {
        "sample and score": max(sampling, batches * slowest, busy),
        "learn": learner.seconds * crowd,
        "all else": SERVICE,
    }


def _need(settings: RunSettings, sampler: Measured, scorers: dict[str, Measured], learner: Measured) -> Need:
    counts = processes(settings)
    rewards = settings.distinct_rewards.values()
    parts = {
        "rollout": counts["rollout"] * sampler.memory,
        "learner": counts["learner"] * learner.memory,
        "rewards": sum(reward.workers * scorers[reward.name].memory for reward in rewards),
        "others": OTHERS + LIBRARIES + LIGHT * (counts["selector"] + counts["observer"]),
    }
    return Need("all processes", sum(counts.values()), 0, parts, float(psutil.virtual_memory().available))
