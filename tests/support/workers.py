"""Workers of the tests: plain classes that the actors import by their name, without torch."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout.records import Chunk, Conditioning, Noise, Prompt, SampleRequest, Trajectory, WeightsId
from tests.support.scorers import is_first


class Echo:
    """Answers, sleeps or fails as it is told."""

    def __init__(self, greeting: str = "hello") -> None:
        self.greeting = greeting
        self.seen: list[int] = []

    def ping(self) -> str:
        return self.greeting

    def variable(self, name: str) -> str:
        return os.environ[name]

    def pid(self) -> int:
        return os.getpid()

    def fail(self, message: str) -> None:
        raise ValueError(message)

    def note(self, number: int, seconds: float) -> list[int]:
        """Remember a number; the list of all so far."""
        time.sleep(seconds)
        self.seen.append(number)
        return list(self.seen)

    def sleep_once(self, marker: str, seconds: float) -> int:
        """Hang the first time that anyone is asked, and answer the second time."""
        if is_first(marker):
            time.sleep(seconds)
        return os.getpid()

    def pair(self) -> tuple[str, NDArray[np.int64]]:
        return "first", np.arange(3)


class Warner(Echo):
    """Says what libraries say, by Python's warnings and by a logger that keeps its lines to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.logger = logging.getLogger("somelib.models")
        self.logger.propagate = False
        warnings.warn("made with random weights", UserWarning, stacklevel=1)

    def warn(self, text: str, *values: object) -> None:
        self.logger.warning(text, *values)

    def warn_and_die(self, text: str) -> None:
        self.logger.error(text)
        os.kill(os.getpid(), signal.SIGKILL)

    def murmur(self) -> None:
        """What nobody needs to know."""
        self.logger.info("loaded")
        warnings.warn("gone in version 9", FutureWarning, stacklevel=1)
        self.logger.warning("**** You are using ZeRO with an untested optimizer, proceed with caution *****")


class Unbuildable:
    """Cannot be made."""

    def __init__(self) -> None:
        raise FileNotFoundError("weights.bin is not there")

    def ping(self) -> None: ...


class DiesOnce(Echo):
    """The first one is killed while it starts."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        if is_first(marker):
            os.kill(os.getpid(), signal.SIGKILL)


class FakeSampler:
    """Has the interface of `rollout.worker.RolloutWorker`; images show the seeds and the weights.

    Those of odd paths are not finite.
    """

    def __init__(self, model: Any, rollout: Any, seed: int, keeps: Any) -> None:
        self.holds: WeightsId | None = None
        self.value = 0.0

    def ping(self) -> int:
        return os.getpid()

    def load(
        self, weights: WeightsId, part: int, parts: int, digest: str, flat: NDArray[np.float32]
    ) -> WeightsId:
        self.holds, self.value = weights, float(flat[0])
        return weights

    def sample(self, requests: Sequence[SampleRequest]) -> list[Chunk]:
        if WeightsId(requests[0].version) != self.holds:
            raise RuntimeError(f"wants v{requests[0].version}, not {self.holds}")
        nothing = np.zeros(0)
        trajectory = Trajectory(states=nothing, log_probs=nothing, steps=nothing)
        count = sum(len(request.noises) for request in requests)
        return [
            Chunk(
                images=np.array([[n.initial % 251, n.path % 251, self.value] for n in request.noises]),
                finite=tuple(noise.path % 2 == 0 for noise in request.noises),
                conditioning=Conditioning(arrays={"group": np.array(request.group_id)}),
                trajectories=(trajectory,) * len(request.noises),
                seconds=0.1 * len(request.noises) / count,
            )
            for request in requests
        ]

    def evaluate(self, prompts: Sequence[Prompt], noises: Sequence[Noise]) -> tuple[Any, NDArray[Any]]:
        assert self.holds is not None
        finite = tuple(noise.path % 2 == 0 for noise in noises)
        return finite, np.array([[noise.initial % 251, self.holds.version, self.value] for noise in noises])


class LateSampler(FakeSampler):
    """One of them starts at once, the others take their time."""

    def __init__(self, marker: str, seconds: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        if not is_first(marker):
            time.sleep(seconds)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Chunk]:
        time.sleep(0.3)
        return [replace(chunk, seconds=os.getpid()) for chunk in super().sample(requests)]


class FakeRank:
    """Has the interface of `learner.worker.LearnerWorker`; an update takes the seconds of its conditioning.

    A rank that is told so raises instead, by itself or as one whose peer has gone.
    """

    def __init__(self, marker: str, **arguments: Any) -> None:
        self.rank = -1
        if os.path.exists(marker):
            raise OSError("no weights here")

    def join(self, rank: int, world: int, address: str, port: int) -> None:
        self.rank = rank

    def parts(self) -> int:
        return 1

    def save(self, url: str) -> int:
        return os.getpid()

    def restore(self, url: str) -> None:
        """Sleep or fail as the URL says: "sleep", or the number of the rank that fails while others sleep."""
        if url == str(self.rank):
            raise MemoryError("8 GB are not enough")
        time.sleep(600)
