"""The interface of a step's stages, implemented on Ray and in one process."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol

from learner.records import Update
from rewards.combine import Scores
from rollout.batches import Batch
from rollout.records import CandidateGroup, Chunk, Handle, Noise, Prompt, Weights
from selection.records import Selection


class Stages(Protocol):
    """Sampling, scoring, selection, training, and the broadcast of weights to the samplers.

    Large values stay where they were computed: chunks and groups have handles of them, for `fetch`.
    """

    async def sample(self, batch: Batch) -> Sequence[Chunk]:
        """Sample a batch with the policy version that it names: a chunk of each of its groups."""
        ...

    async def begin(self, batch: Batch) -> Sequence[Chunk]:
        """Draft a batch: images, and the partial trajectories unless a draft has an ODE of its own."""
        ...

    async def finish(self, batch: Batch, begun: Sequence[Handle]) -> Sequence[Chunk]:
        """Sample the other steps of partial trajectories, in the order of the batch."""
        ...

    async def score(self, prompt: Prompt, chunks: Sequence[Awaitable[Chunk]]) -> Scores:
        """Score a group with every training reward, as its chunks are sampled."""
        ...

    async def measure(self, chunks: Sequence[Awaitable[Chunk]]) -> Mapping[str, float]:
        """Measure the images of a group, if the drift guard is on."""
        ...

    async def select(self, step: int, group_ids: Sequence[int], scores: Sequence[Scores]) -> Selection:
        """Keep the candidates that the learner trains on."""
        ...

    async def update(self, step: int, selection: Selection, groups: Sequence[CandidateGroup]) -> Update:
        """Train on the kept candidates."""
        ...

    async def updates(self) -> int:
        """Count the optimizer steps ever applied, also before the run was resumed."""
        ...

    async def load(self, version: int) -> None:
        """Load the learner's weights into the samplers, as this version."""
        ...

    async def averaged(self, version: int) -> Weights:
        """Publish the average of the weights for an evaluation."""
        ...

    async def draw(
        self, weights: Weights, prompts: Sequence[Prompt], noises: Sequence[Noise]
    ) -> tuple[tuple[bool, ...], Handle]:
        """Draw an image per prompt and noise by the ODE; return whether each is finite, and their handle."""
        ...

    async def score_held_out(
        self, images: Handle, prompts: Sequence[Prompt], finite: Sequence[bool]
    ) -> Scores:
        """Score the finite images with every evaluation reward."""
        ...

    async def fetch(self, handle: Handle) -> Any:
        """Fetch the value behind a handle."""
        ...

    @property
    def failures(self) -> Sequence[str]:
        """The last failure of each reward that had one, except for watching rewards."""
        ...

    @property
    def status(self) -> Mapping[str, float]:
        """Numbers about the stages themselves, which are added to a step's metrics."""
        ...

    def alarms(self) -> dict[str, str]:
        """Return the new outages of watching rewards, by metric."""
        ...
