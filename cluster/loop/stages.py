"""The stages of a step, as the loop calls them: on Ray, or in this process."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

from learner.records import Update
from rewards.combine import Scores
from rollout.batches import Batch
from rollout.records import CandidateGroup, Chunk, Handle, Noise, Prompt, Weights
from selection.records import Selection


class Stages(Protocol):
    """Sampling, scoring, selection, training, and the way of the weights back to sampling.

    Large values stay where they were made: chunks and groups hold handles of them, which `fetch` brings here.
    """

    async def sample(self, batch: Batch) -> Sequence[Chunk]:
        """Sample a batch under the version that it asks for: a chunk of each of its groups."""
        ...

    async def begin(self, batch: Batch) -> Sequence[Chunk]:
        """Sample the first steps of a batch: previews, and the begun candidates."""
        ...

    async def finish(self, batch: Batch, begun: Sequence[Handle]) -> Sequence[Chunk]:
        """Sample the other steps of candidates that were begun, in the order of the batch."""
        ...

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        """Score a group with every training reward, as its chunks are sampled."""
        ...

    async def measure(self, chunks: Sequence[Awaitable[Chunk]]) -> Mapping[str, float]:
        """Measure the images of a group; nothing where nobody watches them."""
        ...

    async def select(self, step: int, group_ids: Sequence[int], scores: Sequence[Scores]) -> Selection:
        """Keep the candidates that the learner trains on."""
        ...

    async def update(self, step: int, selection: Selection, groups: Sequence[CandidateGroup]) -> Update:
        """Train on the kept candidates."""
        ...

    async def updates(self) -> int:
        """Count the optimizer steps that were ever applied, also before the run was resumed."""
        ...

    async def load(self, version: int) -> None:
        """Hand the learner's weights over to the samplers, as this version."""
        ...

    async def averaged(self, version: int) -> Weights:
        """Publish the average of the weights for an evaluation, which then begins."""
        ...

    async def draw(
        self, weights: Weights, prompts: Sequence[Prompt], noises: Sequence[Noise]
    ) -> tuple[tuple[bool, ...], Handle]:
        """Draw an image for every prompt and noise by the ODE: which are finite, and a handle of all."""
        ...

    async def judge(self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]) -> Scores:
        """Score images that are finite with every evaluation reward."""
        ...

    async def fetch(self, handle: Handle) -> Any:
        """Bring a value here."""
        ...

    @property
    def failures(self) -> Sequence[str]:
        """The last failure of every reward that had one and counts."""
        ...

    @property
    def status(self) -> Mapping[str, float]:
        """Numbers about the stages themselves, which a step's metrics hold too."""
        ...

    def alarms(self) -> dict[str, str]:
        """Return the watching rewards that have stopped working since this was last asked, by metric."""
        ...
