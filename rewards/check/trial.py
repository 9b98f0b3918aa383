"""Trial of one reward on a blank, a noise and a real image, in a separate process."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
from numpy.typing import NDArray

from rewards.check.known import Recognised, recognised
from rewards.check.pictures import picture, plain
from rewards.registry import resolve
from rewards.scorer import RewardError, Traits, stray
from rewards.suitability import objection, refusal
from rewards.worker import RewardWorker
from rollout.records import Prompt

IMAGES: Final = ("blank", "noise", "real")
_ALIKE: Final = 1e-3
"""Scores whose spread is at most this share of the largest count as equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Results of a reward: its scores of `IMAGES` (NaN is missing), seconds, and peak memory in GB.

    ``prompt`` is the prompt of the images, and ``known`` the result on images with known answers;
    ``refused`` describes the prompts that do not suit the reward, and is empty if all do.
    """

    traits: Traits
    scores: tuple[float, ...]
    prompt: str
    known: Recognised | None
    seconds_to_load: float
    seconds_per_image: float
    memory_gb: float
    gpu_gb: float
    refused: str = ""

    @property
    def fault(self) -> str:
        """The fault of the scores or the prompts; empty without one."""
        if np.isnan(self.scores).all():
            return "scored none of the images"
        return stray(np.array(self.scores), self.traits) or self.refused

    @property
    def doubt(self) -> str:
        """The reason to doubt the scores, since wrong weights give scores as well; empty without one."""
        if self.known is not None and not self.known.enough:
            return (
                f"knew only {self.known.right} of {len(self.known.texts)} images by their prompts "
                f"({', '.join(self.known.texts)}); so do wrong weights, labels or preprocessing"
            )
        scores = [score for score in self.scores if not np.isnan(score)]
        if len(scores) > 1 and np.ptp(scores) <= _ALIKE * np.abs(scores).max():
            return (
                f"scores all images alike ({scores[-1]:g}), so nothing shows that it works; "
                f"bring an image of its prompt {self.prompt!r} with --image"
            )
        return ""


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why a reward could not be tried, and advice that may help."""

    reason: str
    advice: str


def try_out(
    name: str,
    options: Mapping[str, Any],
    prompts: Sequence[Prompt],
    size: tuple[int, int],
    real: NDArray[np.uint8] | None,
) -> Trial | Failure:
    """Try a reward in a new process on (width, height) images and the first prompt that suits it.

    ``real`` (H, W, 3) is the real image; without one the prompt is drawn, where possible.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        try:
            return processes.submit(_attempt, name, dict(options), list(prompts), size, real).result()
        except BrokenProcessPool:
            return Failure("its process was killed", "see that there is memory enough for its model")


def _attempt(
    name: str,
    options: dict[str, Any],
    prompts: list[Prompt],
    size: tuple[int, int],
    real: NDArray[np.uint8] | None,
) -> Trial | Failure:
    try:
        scorer = resolve(name)
        refused = refusal(name, scorer, prompts)
        prompt = next((prompt for prompt in prompts if not objection(scorer, prompt)), None)
        if prompt is None:
            raise RewardError(refused)
        started = time.perf_counter()
        worker = RewardWorker(name, options)
        loaded = time.perf_counter() - started
        images = np.stack([*plain(size), picture(prompt, size) if real is None else real])
        found = _measure(worker, images, prompt, loaded, recognised(worker, scorer, size))
        return replace(found, refused=refused)
    except (RewardError, ValueError) as error:
        return Failure(str(error), advice(name, error))


def _measure(
    worker: RewardWorker, images: NDArray[np.uint8], prompt: Prompt, loaded: float, known: Recognised | None
) -> Trial:
    asked = [prompt] * len(images)
    judgement = worker.score(images, asked)
    started = time.perf_counter()
    worker.score(images, asked)  # again, since the first call includes one-time initialisation
    seconds = time.perf_counter() - started
    return Trial(
        traits=worker.traits,
        scores=tuple(np.where(judgement.valid, judgement.values, np.nan).tolist()),
        prompt=prompt.text,
        known=known,
        seconds_to_load=loaded,
        seconds_per_image=seconds / len(images),
        memory_gb=_peak_gb(),
        gpu_gb=_gpu_gb(),
    )


def _peak_gb() -> float:
    """Return the peak memory of this process, in GB.

    On Linux it comes from /proc, since getrusage there includes the peak inherited from the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _gpu_gb() -> float:
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() / 1e9 if torch and torch.cuda.is_available() else 0.0


def advice(name: str, error: BaseException) -> str:
    """Suggest a remedy for a reward's failure, by the first known kind among its causes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError):
            return _advice_on_import(name, cause)
        if isinstance(cause, httpx.TransportError):
            return "start the server that its options name, or correct the address"
        if isinstance(cause, OSError):
            return (
                "put the weights there, or name in the reward's options a folder that has them; "
                "`hf download NAME` fetches those of the hub on a machine that reaches it"
            )
        cause = cause.__cause__ or cause.__context__
    return ""


def _advice_on_import(name: str, cause: ImportError) -> str:
    own = name.partition(":")[0]
    if cause.name and own.split(".")[0] == cause.name.split(".")[0]:
        return f"put {own} into the folder that you start from, or its folder into PYTHONPATH"
    return (
        f"install the package with the module {cause.name}: `uv pip install -r pyproject.toml` brings those "
        "of the built-in rewards; one with other needs can be served from another environment"
    )
