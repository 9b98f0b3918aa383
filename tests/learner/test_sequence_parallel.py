"""Ranks that divide the tokens of every candidate, on real process groups: they train as one rank does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rollout.tools.tiny_families import TINY
from tests.support.ranks import in_world
from tests.support.tiny_learner import learner_settings, member, model_settings, sample, update, weights

METRICS = ("loss", "kl", "pull", "grad_norm")


@dataclass(frozen=True)
class Training:
    """Three updates of a family, of which the first two may be restored."""

    family: str
    folder: Path
    stage: int
    lora: int
    together: int = 1
    save: Path | None = None
    resume: Path | None = None

    def __call__(self, rank: int, world: int, port: int) -> tuple[list[list[float]], NDArray[np.float32]]:
        """Return metrics and weights."""
        model, rollout = model_settings(self.folder, lora_rank=self.lora), TINY[self.family].settings()
        learner = learner_settings(
            ranks=world, sequence_parallel=self.together, zero_stage=self.stage, clip=0.5, learning_rate=1e-3,
            micro_batch=8, beta=0.1,
        )  # fmt: skip
        batch = sample(model, rollout)
        worker = member(model, rollout, learner, rank, world, port)
        (work,) = batch.calls(ranks=learner.shares)[rank // self.together]
        if self.resume:
            worker.restore(str(self.resume))
        found = []
        for number in range(2 if self.resume else 0, 3):
            metrics = update(worker, work)
            found.append([metrics[name] for name in METRICS])
            if self.save and number == 1:
                worker.save(str(self.save))
        return found, weights(worker)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> list[Training]:
    """Every family that diffusers can divide, under ZeRO 1 and 3, with an adapter and with all parameters."""
    home = tmp_path_factory.mktemp("families")
    cases = [("flux", 1, 4), ("flux2_klein", 3, 4), ("qwen_image", 1, 4), ("wan", 3, 4), ("wan", 1, 0)]
    return [
        Training(name, TINY[name].save(home / f"{name}{lora}"), stage, lora) for name, stage, lora in cases
    ]


def check(trainings: list[Training], world: int, together: int) -> None:
    alone = in_world(1, trainings)
    divided = in_world(world, [replace(one, together=together) for one in trainings])
    for one, ((expected, whole),), found in zip(trainings, alone, divided, strict=True):
        for metrics, _ in found:
            np.testing.assert_allclose(metrics, expected, rtol=1e-5, err_msg=str(one))
        # Adam makes full steps of gradients that are zero but for rounding.
        assert np.abs(found[0][1] - whole).max() < (1e-6 if one.lora else 1e-4)


def test_two_ranks_divide_tokens_and_train_as_one(trainings: list[Training]) -> None:
    check(trainings, 2, together=2)


@pytest.mark.slow
def test_two_pairs_of_ranks_train_as_one(trainings: list[Training]) -> None:
    check(trainings, 4, together=2)


def test_a_checkpoint_fits_ranks_that_divide_nothing(trainings: list[Training], tmp_path: Path) -> None:
    one = replace(trainings[3], together=2, save=tmp_path / "save")
    ((expected, _), _), *_ = in_world(2, [one])
    (((found, _),),) = in_world(1, [replace(one, together=1, save=None, resume=one.save)])
    np.testing.assert_allclose(found, expected[2:], rtol=1e-5)
