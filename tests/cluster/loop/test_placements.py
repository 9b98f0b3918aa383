"""One loop on Ray and in one process: equal steps, bit for bit."""

from __future__ import annotations

import asyncio
from dataclasses import astuple
from typing import Any

import pytest

from cluster.actors.stages import start_stages
from cluster.config.preflight import check
from cluster.config.settings import RunSettings
from cluster.config.sources import resolve
from cluster.local.in_process import LocalStages, load_scorers
from cluster.loop.loop import train
from cluster.loop.production import consecutive
from cluster.loop.run import Run, Step
from cluster.loop.stages import Stages

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("node", "process_group")]


class Kept:
    """An observer that keeps all of a step that is not time."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    async def after(self, run: Run, step: int, made: Step | None, metrics: dict[str, Any]) -> None:
        if made is None:
            return
        assert made.update is not None
        self.steps.append(
            {
                "noises": [group.noises for group in made.groups],
                "rewards": [one.scores.total.tolist() for one in made.batch],
                "kept": [astuple(kept) for kept in made.selection.kept],
                "update": {k: v for k, v in made.update.metrics.items() if "seconds" not in k},
            }
        )


async def steps_of(settings: RunSettings, stages: Stages) -> list[Any]:
    kept = Kept()
    await train(Run(settings, check(settings).train, stages, consecutive(settings), [kept]), 0)
    return kept.steps


FORWARD = {"rollout": {"dynamics": "ode", "solver": "dpm2"}, "learner": {"objective": {"name": "nft"}}}
LAGGING = {"name": "nft", "behaviour_decay": 0.5, "behaviour_ramp": 0.1}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"selection": {"drafts": 8}},
        {**FORWARD, "selection": {"adaptive": 3}},
        {**FORWARD, "selection": {"drafts": 8}, "learner": {"objective": LAGGING}},
    ],
    ids=["sampled", "screened", "adaptive ode", "drafted ode, lagging"],
)
def test_three_steps_in_process_are_three_steps_of_the_service(changes: dict[str, dict[str, Any]]) -> None:
    values: dict[str, dict[str, Any]] = {
        "selection": {"candidates": 6, "keep": 4},
        "rollout": {"steps": 4, "threads": 1, "batch": 4, "draft_steps": 2},
        "learner": {"threads": 1},
    }
    merged = {section: own | changes.get(section, {}) for section, own in values.items()}
    settings = resolve("shapes", {"steps": 3, "groups_per_step": 2, "guard": {"action": "off"}, **merged})

    async def served() -> list[Any]:
        stages = start_stages(settings)
        await stages.ready()
        return await steps_of(settings, stages)

    service = asyncio.run(served())
    local = asyncio.run(steps_of(settings, LocalStages(settings, load_scorers(settings))))
    assert len(service) == 3
    assert service == local
