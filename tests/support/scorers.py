"""Scorers of the tests, good and bad; the replicas import them by their names."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rewards.scorer import Judgement, Traits
from rollout.records import Prompt

Images = NDArray[np.uint8]
HUNG = 3600.0


class Scorer:
    """Scores an image by its first value."""

    traits: ClassVar[Traits] = Traits(low=0.0, high=255.0)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Judgement:
        values = images[:, 0, 0, 0].astype(np.float64)
        return Judgement(values=values, valid=np.ones(len(images), dtype=np.bool_))

    @classmethod
    def check(cls, prompt: Prompt) -> None: ...


class ConstantScorer(Scorer):
    """Scores every image alike."""

    value: ClassVar[float] = 0.5

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Judgement:
        return Judgement(values=np.full(len(images), self.value), valid=np.ones(len(images), dtype=np.bool_))


class NanScorer(ConstantScorer):
    """Gives every image a score that is no number."""

    value: ClassVar[float] = float("nan")


class BrokenScorer(Scorer):
    """Fails at every call."""

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Judgement:
        raise RuntimeError("the detector is out of order")


class HungScorer(Scorer):
    """Never answers in time."""

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Judgement:
        time.sleep(HUNG)
        return super().__call__(images, prompts)


class UnbuildableScorer(Scorer):
    """Cannot be made."""

    def __init__(self) -> None:
        raise FileNotFoundError("detector.bin is not there")


class CountingScorer(Scorer):
    """Scores every image by the size of the call that it came in."""

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Judgement:
        return Judgement(values=np.full(len(images), float(len(images))), valid=images[:, 0, 0, 0] != 0)


class WholeGroupScorer(CountingScorer):
    """The same, of a reward that compares the candidates of a group."""

    traits: ClassVar[Traits] = Traits(low=0.0, high=255.0, groupwise=True)


def is_first(marker: str) -> bool:
    """Whether nobody came here before, of all processes."""
    with suppress(FileExistsError):
        Path(marker).touch(exist_ok=False)
        return True
    return False


class SlowScorer(Scorer):
    """Takes its time for every image, like a model on a device of its own; once, or for a time, too long.

    With ``slow_while``, the path of a file, it takes its time only while the file exists.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        hang_once: str = "",
        log: str = "",
        start: float = 0.0,
        hang_while: str = "",
        slow_while: str = "",
    ) -> None:
        time.sleep(start)
        self.seconds, self.hang_once, self.log = seconds, hang_once, log
        self.hang_while, self.slow_while = hang_while, slow_while

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Judgement:
        began = time.time()
        if (self.hang_once and is_first(self.hang_once)) or (
            self.hang_while and Path(self.hang_while).exists()
        ):
            time.sleep(HUNG)
        if not self.slow_while or Path(self.slow_while).exists():
            time.sleep(self.seconds * len(images))
        if self.log:
            with Path(self.log).open("a", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {began} {time.time()}\n")
        return super().__call__(images, prompts)


class FaultyScorer(Scorer):
    """Works like `SlowScorer`, but for a share of the calls: they raise, hang or return NaN.

    The faults are those of a seed: the n-th call of all replicas together has the same one in every run, and
    every hundred calls have exactly their share.
    """

    def __init__(self, seconds: float, log: str, raising: float, hanging: float, nan: float) -> None:
        self.seconds, self.log = seconds, Path(log)
        self.kinds, self.shares = ["raise", "hang", "nan"], np.cumsum([raising, hanging, nan])

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Judgement:
        fault = self._fault()
        if fault == "hang":
            time.sleep(HUNG)
        time.sleep(self.seconds * len(images))
        if fault == "raise":
            raise ConnectionResetError("the other side went away")
        judgement = super().__call__(images, prompts)
        if fault == "nan":
            judgement.values[:] = np.nan
        return judgement

    def _fault(self) -> str:
        """What befalls this call; the length of the log, to which every call adds a byte, numbers it."""
        with self.log.open("ab") as file:
            file.write(b".")
            file.flush()
            number = file.tell()
        order = np.random.default_rng((20260, number // 100)).permutation(100)
        place = int(np.searchsorted(100 * self.shares, order[number % 100] + 0.5))
        return self.kinds[place] if place < len(self.kinds) else ""
