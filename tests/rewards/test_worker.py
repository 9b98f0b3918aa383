from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from copy import copy
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.registry import REWARDS, resolve
from rewards.scorer import Judgement, RewardError, Scorer, Traits
from rewards.scorers.jpeg import JpegScorer
from rewards.worker import RewardWorker
from rollout.records import Prompt

Images = NDArray[np.uint8]


class Brightness:
    """A user's own reward that fails on request."""

    traits: ClassVar[Traits] = Traits(low=0.0, high=255.0)

    def __init__(self, wrong: str = "") -> None:
        if wrong == "made":
            raise OSError("no weights in /nowhere")
        self.wrong = wrong

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Judgement:
        if self.wrong == "raises":
            raise ZeroDivisionError("by hand")
        values = images.mean(axis=(1, 2, 3), dtype=np.float64)
        if self.wrong == "nan":
            values[::2] = np.nan
            values[1::4] = np.inf
        valid = np.ones(len(images) - (self.wrong == "short"), dtype=np.bool_)
        return Judgement(values=values, valid=valid)

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Accept every prompt."""


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_rewards")
    module.Brightness = Brightness  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    module.Empty = type("Empty", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_rewards", module)


@pytest.fixture
def images() -> Images:
    return np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(index=i, text="a photo of a circle") for i in range(count)]


def test_a_users_own_reward_is_scored(images: Images) -> None:
    worker = RewardWorker("own_rewards:Brightness", {})
    judgement = worker.score(images, prompts(8))
    np.testing.assert_allclose(judgement.values, images.mean(axis=(1, 2, 3)))
    assert judgement.valid.all()
    assert worker.ping() == "own_rewards:Brightness"


def test_scores_that_are_not_finite_are_missing(images: Images) -> None:
    judgement = RewardWorker("own_rewards:Brightness", {"wrong": "nan"}).score(images, prompts(8))
    assert judgement.valid.tolist() == [False, False, False, True] * 2
    assert not (judgement.values == 0.0).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("raises", "reward 'own_rewards:Brightness' failed: ZeroDivisionError: by hand"),
        ("short", r"failed: ValueError: valid must have shape \(8,\), got \(7,\)"),
    ],
)
def test_a_failure_names_the_reward_and_its_cause(images: Images, wrong: str, message: str) -> None:
    worker = RewardWorker("own_rewards:Brightness", {"wrong": wrong})
    with pytest.raises(RewardError, match=message) as caught:
        worker.score(images, prompts(8))
    assert caught.value.__cause__ is not None
    assert str(copy(caught.value)) == str(caught.value)  # it is rebuilt so after a journey to the driver


def test_a_scorer_that_cannot_be_made_says_so() -> None:
    with pytest.raises(RewardError, match="could not be made: OSError: no weights in /nowhere"):
        RewardWorker("own_rewards:Brightness", {"wrong": "made"})
    with pytest.raises(RewardError, match=r"'jpeg' could not be made: TypeError: .*colour"):
        RewardWorker("jpeg", {"colour": 1})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda images: images.astype(np.float32),
        lambda images: images[..., :1],
        lambda images: images[0],
        lambda images: images[:7],
        lambda images: images[:, :0],
    ],
    ids=["dtype", "channels", "dimensions", "count", "empty"],
)
def test_images_that_do_not_fit_are_refused(images: Images, spoil: Callable[[Images], Images]) -> None:
    with pytest.raises(RewardError, match=r"'jpeg' expected \(N, H, W, 3\) uint8 images and N prompts, got"):
        RewardWorker("jpeg", {}).score(spoil(images), prompts(8))


def test_jpeg_prefers_flat_images_or_the_opposite(images: Images) -> None:
    both = np.stack([np.full_like(images[0], 90), images[0]])
    small = RewardWorker("jpeg", {}).score(both, prompts(2)).values
    large = RewardWorker("jpeg", {"prefer": "large"}).score(both, prompts(2)).values
    assert small[0] > small[1] > JpegScorer.traits.low
    assert (small == -large).all()
    JpegScorer.check(prompts(1)[0])
    with pytest.raises(ValueError, match="'small' or 'large', got 'medium'"):
        JpegScorer(prefer="medium")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", REWARDS)
def test_every_named_reward_resolves_without_loading_anything_heavy(name: str) -> None:
    found = resolve(name)
    assert isinstance(found.traits, Traits)
    assert found.traits.low < found.traits.high
    assert isinstance(found.__new__(found), Scorer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("geneva", "unknown reward 'geneva': expected one of aesthetic, .*jpeg, .*ocr, .*, or module:Class"),
        ("nowhere.at_all:Class", "cannot import 'nowhere.at_all'"),
        ("own_rewards:Nothing", "module 'own_rewards' has no 'Nothing'"),
        ("own_rewards:number", "must be a class, got 3"),
        ("own_rewards:Empty", "Empty lacks __call__, check, traits of a Scorer"),
    ],
)
def test_a_bad_name_is_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(name)


class Wild(Brightness):
    """A reward that scores outside its declared range."""

    traits: ClassVar[Traits] = Traits(low=100.0, high=140.0)


def test_a_score_outside_the_declared_range_stands_with_a_remark(images: Images) -> None:
    sys.modules["own_rewards"].Wild = Wild  # type: ignore[attr-defined]
    images[3], images[5] = 255, 0
    found = RewardWorker("own_rewards:Wild", {}).score(images, [Prompt(index=0, text="")] * 8)
    assert found.values[3] == 255
    assert found.valid.all()
    assert found.remark == "scored 255, but declares 100 to 140"
    assert not RewardWorker("own_rewards:Brightness", {}).score(images, [Prompt(index=0, text="")] * 8).remark


def test_a_missing_score_is_in_every_range(images: Images) -> None:
    sys.modules["own_rewards"].Wild = Wild  # type: ignore[attr-defined]
    found = RewardWorker("own_rewards:Wild", {"wrong": "nan"}).score(images, [Prompt(index=0, text="")] * 8)
    assert not found.valid.all()
    assert not found.remark
