"""Stages without models: pure functions of seeds and versions, with failures where a test wants them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config.preflight import Inputs
from cluster.config.settings import RunSettings
from cluster.loop.course import Course, course_of
from cluster.record.checkpoints import Checkpoints, checkpoints_of
from cluster.record.run_folder import RunFolder
from learner.records import Update, Written
from rewards.combine import Scores
from rollout.batches import Batch
from rollout.records import CandidateGroup, Chunk, Handle, Noise, Prompt, SampleRequest, Weights, WeightsId
from selection.records import Selection
from selection.selector import Selector
from tests.support.saving import written_at

PROMPTS = tuple(Prompt(index=index, text=f"prompt {index}") for index in range(5))
START = np.array([0.1, 0.9, 0.5, 0.5, 0.2])
"""What the held-out prompts score before training."""
METRICS = {
    "ratio_max_deviation": 0.0, "fresh_clip_fraction": 0.0, "skipped_updates": 0.0, "skipped_in_a_row": 0.0,
    "learning_rate": 0.1,
}  # fmt: skip


class FakeStages:
    """Every stage of a run. A candidate's reward is its path's seed, an evaluation's follows the version.

    ``state``, which is saved and restored, counts the steps that were trained.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.selector = Selector(settings.selection, settings.seed)
        self.state = self.restarted = 0
        self.sampled: list[tuple[int, int]] = []
        self.loaded: list[int] = []
        self.missing: dict[str, str] = {}
        self.before_update: Callable[[int], None] = lambda step: None
        self.measured: Callable[[int], float] = lambda group: 1.0
        self.finite: Callable[[Noise], bool] = lambda noise: True
        self.value: Callable[[Noise], float] = lambda noise: float(noise.path % 251)
        self.update_metrics: dict[str, float] = {}
        self.suspects: tuple[int, ...] = ()
        self.broken: tuple[str, ...] = ()

    @property
    def saver(self) -> FakeStages:
        return self

    async def sample(self, batch: Batch) -> Sequence[Chunk]:
        for part in batch:
            self.sampled.append((part.group_id, part.version))
            await asyncio.sleep(0.001 * (part.group_id % 3))
        return [self._chunk(part) for part in batch]

    async def begin(self, batch: Batch) -> Sequence[Chunk]:
        return [self._chunk(part) for part in batch]

    async def finish(self, batch: Batch, begun: Sequence[Handle]) -> Sequence[Chunk]:
        assert list(begun) == [noise for part in batch for noise in part.noises]
        return await self.sample(batch)

    def _chunk(self, part: SampleRequest) -> Chunk:
        return Chunk(
            images=np.zeros((len(part.noises), 4, 4, 3), np.uint8), conditioning=part.group_id,
            finite=tuple(map(self.finite, part.noises)), trajectories=part.noises, seconds=0.5,
        )  # fmt: skip

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        done = await asyncio.gather(*chunks)
        finite = np.array([good for chunk in done for good in chunk.finite])
        values = np.array([self.value(noise) for chunk in done for noise in chunk.trajectories])
        total = np.where(finite, values, np.nan)
        return Scores(rewards={"one": total}, weights={"one": 1.0}, valid=finite, total=total, strict=None)

    async def measure(self, chunks: Sequence[Awaitable[Chunk]]) -> Mapping[str, float]:
        first, *_ = await asyncio.gather(*chunks)
        return {"edges": self.measured(first.conditioning)}

    async def select(self, step: int, group_ids: Sequence[int], scores: Sequence[Scores]) -> Selection:
        return self.selector.select(step, group_ids, scores)

    async def update(self, step: int, selection: Selection, groups: Sequence[CandidateGroup]) -> Update:
        self.before_update(step)
        self.state += 1
        metrics = {**METRICS, "updates": self.state, **self.update_metrics}
        return Update(metrics=metrics, suspects=self.suspects, broken=self.broken)

    async def updates(self) -> int:
        return self.state

    async def load(self, version: int) -> None:
        self.loaded.append(version)

    async def averaged(self, version: int) -> Weights:
        return Weights(id=WeightsId(version, averaged=True), checksums=(), parts=())

    async def draw(
        self, weights: Weights, prompts: Sequence[Prompt], noises: Sequence[Noise]
    ) -> tuple[tuple[bool, ...], Handle]:
        images = np.zeros((len(prompts), 4, 4, 3), np.uint8)
        return (True,) * len(prompts), (weights.id.version, images)

    async def score_held_out(
        self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]
    ) -> Scores:
        version, _ = images
        chosen = [prompt.index for prompt in prompts]
        found = (START + version * np.array([0.02, -0.01, 0.03, 0.0, 0.1]))[chosen]
        watched = (1 - START * version / self.settings.steps)[chosen]
        return Scores(
            rewards={"shapes": found, "jpeg": watched}, weights={"shapes": 1.0, "jpeg": 0.0},
            valid=np.isfinite(found), total=found, strict=None,
        )  # fmt: skip

    async def fetch(self, handle: Handle) -> Any:
        return handle[1] if isinstance(handle, tuple) else handle

    @property
    def failures(self) -> Sequence[str]:
        return ()

    @property
    def status(self) -> Mapping[str, float]:
        return {}

    def alarms(self) -> dict[str, str]:
        found, self.missing = self.missing, {}
        return found

    async def save(self, url: str) -> None:
        self.url = url
        (Path(url.removeprefix("file://")) / "state").write_text(str(self.state))

    async def saved(self, *, wait: bool) -> list[Written]:
        return written_at(self.url)

    async def restore(self, url: str) -> None:
        self.state = int((Path(url.removeprefix("file://")) / "state").read_text())

    async def restart(self) -> None:
        self.state = 0
        self.restarted += 1


def course(
    settings: RunSettings,
    stages: FakeStages,
    folder: RunFolder | None = None,
    checkpoints: Checkpoints | None = None,
    trackers: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> Course:
    """A run of the bundled observers over fake stages, in the run folder of its settings."""
    assert settings.folder is not None
    folder = folder or RunFolder(settings.folder)
    if not folder.config.exists():
        folder.create(settings)
    checkpoints = checkpoints or checkpoints_of(settings, folder)
    return course_of(settings, Inputs(PROMPTS, PROMPTS), folder, checkpoints, stages, [folder.log, *trackers])
