from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

from rewards.models.color_namer import COLORS, ColorNamer
from rewards.models.detection import Detection
from rewards.models.open_clip import OpenClip
from rewards.scorer import RewardError, Scorer
from rewards.scorers.geneval import RULES, GenEvalScorer, color_needed
from rewards.worker import RewardWorker
from rollout.records import Prompt
from tests.support.reward_models import BOXES, Images, noise_images, planted

Line = dict[str, Any]
Painted = tuple[str, float, str, tuple[float, ...]]
LOW = 0.02
"""Below what a random network says of its objects, whose 81 classes are about equally likely."""
PAINTS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220), "white": (255, 255, 255)}


@pytest.fixture(scope="module")
def scorer(random_detector: Path, tiny_clip: Path) -> GenEvalScorer:
    return GenEvalScorer(
        detector=str(random_detector), clip=str(tiny_clip), detector_size=64, batch=2, device="cpu"
    )


def want(kind: str, count: int = 1, **extra: Any) -> Line:
    return {"class": kind, "count": count, **extra}


def prompt(tag: str, *include: Line, **extra: Any) -> Prompt:
    return Prompt(index=0, text="a photo", metadata={"tag": tag, "include": list(include), **extra})


def test_the_namer_is_genevals_classifier(tiny_clip: Path) -> None:
    clip = OpenClip(str(tiny_clip), "", "cpu")
    crops = [crop[: 16 + 8 * i] for i, crop in enumerate(noise_images(4))]
    kinds = ["cat", "tv remote", "cat", "dog"]
    expected = []
    for crop, kind in zip(crops, kinds, strict=True):
        scores = []
        for color in COLORS:
            texts = [
                f"a photo of a {color} {kind}",
                f"a photo of a {color}-colored {kind}",
                f"a photo of a {color} object",
            ]
            mean = np.mean([clip.texts([text])[0].numpy() for text in texts], axis=0)
            scores.append(clip.images([crop])[0].numpy() @ mean / np.linalg.norm(mean))
        expected.append(COLORS[int(np.argmax(scores))])
    assert ColorNamer(clip)(crops, kinds) == expected


class ByPaint:
    """A fake CLIP whose vectors encode colours: of an image's mean and of a named paint."""

    def __init__(self) -> None:
        self.texts_seen: list[str] = []
        self.crops_seen: list[Images] = []

    def images(self, crops: Sequence[Images]) -> torch.Tensor:
        self.crops_seen += crops
        means = np.array([crop.reshape(-1, 3).mean(0) for crop in crops])
        return self._unit(torch.tensor(means - 128))

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        self.texts_seen += texts
        named = [[paint for color, paint in PAINTS.items() if color in text] for text in texts]
        paints = [paint[0] if paint else (128, 128, 129) for paint in named]
        return self._unit(torch.tensor(paints, dtype=torch.float64) - 128)

    def _unit(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors, dim=-1)


@pytest.fixture
def judged(
    scorer: GenEvalScorer, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[float, float, ByPaint]]:
    """Judges an image with painted objects, which the detector finds with the given probabilities."""

    def judge(asked: Prompt, *objects: Painted) -> tuple[float, float, ByPaint]:
        image = np.full((1, 64, 64, 3), 90, dtype=np.uint8)
        for _, _, color, (left, top, right, bottom) in objects:
            image[0, int(top) : int(bottom), int(left) : int(right)] = PAINTS[color]
        logits = planted(*[(kind, sure, box) for kind, sure, _, box in objects])
        monkeypatch.setattr(scorer._detector, "_forward", lambda images: tuple(part[None] for part in logits))
        clip = ByPaint()
        monkeypatch.setattr(scorer, "_colors", ColorNamer(clip))  # type: ignore[arg-type]
        judgement = scorer(image, [asked])
        assert judgement.valid.all()
        return judgement.values[0], judgement.details["strict"][0], clip

    return judge


RED_CAT, BLUE_CAT = ("cat", 0.95, "red", BOXES[0]), ("cat", 0.95, "blue", BOXES[0])
DOG, UNSURE_DOG = ("dog", 0.95, "green", BOXES[1]), ("dog", 0.85, "white", BOXES[2])
VERDICTS = [
    (prompt("single_object", want("cat")), (RED_CAT,), 1.0, 1.0),
    (prompt("single_object", want("cat")), (DOG,), 0.0, 0.0),
    (prompt("two_object", want("cat"), want("dog")), (RED_CAT, DOG), 1.0, 1.0),
    (prompt("two_object", want("cat"), want("dog", 2)), (RED_CAT, DOG, UNSURE_DOG), 1.0, 1.0),
    (prompt("counting", want("dog", 2)), (DOG, UNSURE_DOG), 0.5, 0.0),
    (prompt("counting", want("dog", 1), exclude=[want("dog", 2)]), (DOG, UNSURE_DOG), 1.0, 1.0),
    (prompt("colors", want("cat", color="red")), (RED_CAT,), 1.0, 1.0),
    (prompt("colors", want("cat", color="red")), (BLUE_CAT,), 0.5, 0.0),
    (prompt("color_attr", want("cat", color="red"), want("dog", color="green")), (RED_CAT, DOG), 1.0, 1.0),
    (prompt("color_attr", want("cat", color="green"), want("dog", color="red")), (RED_CAT, DOG), 0.5, 0.0),
    (prompt("position", want("cat"), want("dog", position=["right of", 0])), (RED_CAT, DOG), 1.0, 1.0),
    (prompt("position", want("cat"), want("dog", position=["below", 0])), (RED_CAT, DOG), 2 / 3, 0.0),
]


@pytest.mark.parametrize(("asked", "objects", "soft", "strict"), VERDICTS)
def test_planted_objects_are_judged_by_the_rules(
    judged: Any, asked: Prompt, objects: Sequence[Any], soft: float, strict: float
) -> None:
    GenEvalScorer.check(asked)
    assert judged(asked, *objects)[:2] == (pytest.approx(soft), strict)


def test_flow_grpos_reward_is_an_option(judged: Any, scorer: GenEvalScorer) -> None:
    below = prompt("position", want("cat"), want("dog", position=["below", 0]))
    assert judged(below, RED_CAT, DOG)[:2] == (pytest.approx(2 / 3), 0.0)
    scorer._flow_grpo = True
    try:
        assert judged(below, RED_CAT, DOG)[:2] == (pytest.approx(0.75), 0.0)
        assert judged(prompt("single_object", want("dog")), *[DOG] * 20)[:2] == (-14.0, 1.0)
    finally:
        scorer._flow_grpo = False


def test_the_option_widens_the_range_that_scores_may_have(random_detector: Path, tiny_clip: Path) -> None:
    options: Any = {"detector": str(random_detector), "clip": str(tiny_clip), "device": "cpu"}
    assert GenEvalScorer(**options, reward="flow_grpo").traits.low == -14
    assert GenEvalScorer(**options).traits.low == GenEvalScorer.traits.low == 0
    with pytest.raises(ValueError, match="reward must be 'soft' or 'flow_grpo', got 'strict'"):
        GenEvalScorer(**options, reward="strict")


def test_sixteen_objects_of_a_class_count(judged: Any) -> None:
    sixteen = prompt("counting", want("dog", 16), exclude=[want("dog", 17)])
    assert judged(sixteen, *[DOG] * 20)[:2] == (1.0, 1.0)
    assert judged(prompt("counting", want("dog", 17)), *[DOG] * 20)[1] == 0.0


def test_only_colors_asked_for_are_looked_at(judged: Any) -> None:
    clip = judged(prompt("two_object", want("cat"), want("dog")), RED_CAT, DOG)[2]
    assert not clip.crops_seen
    clip = judged(prompt("color_attr", want("cat"), want("dog", color="green")), RED_CAT, UNSURE_DOG, DOG)[2]
    assert len(clip.crops_seen) == 1
    assert (clip.crops_seen[0] == PAINTS["green"]).all()
    assert "a photo of a green-colored dog" in clip.texts_seen


def test_the_surest_are_asked_for_their_color() -> None:
    pairs = zip("abbab", (0.4, 0.5, 0.9, 0.6, 0.7), strict=True)
    found = [Detection(kind=kind, confidence=sure, box=BOXES[0]) for kind, sure in pairs]
    metadata = {"include": [want("b", 2, color="red"), want("a"), want("b", color="blue")]}
    assert color_needed(found, metadata) == [2, 4]


def test_scores_are_in_range_and_alone_as_together(
    scorer: GenEvalScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewards.scorers.geneval.RULES", type(RULES)(threshold=LOW, counting_threshold=LOW))
    images, asked = noise_images(5), []
    for found in scorer._detector.detect(images, LOW):
        kinds = [instance.detection.kind for instance in found]
        asked.append(prompt("colors", want(kinds[0], kinds.count(kinds[0]), color="red")))
    together = scorer(images, asked)
    assert together.values.shape == together.valid.shape == together.details["strict"].shape == (5,)
    assert together.valid.all()
    assert together.values.max() <= 1
    assert together.values.min() >= 0.5  # the counts are right
    for i in range(5):
        alone = scorer(images[i : i + 1], asked[i : i + 1])
        assert alone.values[0] == together.values[i]
        assert alone.details["strict"][0] == together.details["strict"][i]


@pytest.mark.parametrize("part", ["detector", "clip"])
def test_broken_weights_are_a_failure_and_not_a_zero(
    part: str, random_detector: Path, tiny_clip: Path
) -> None:
    options = {"detector": str(random_detector), "clip": str(tiny_clip), "detector_size": 64, "device": "cpu"}
    worker = RewardWorker("geneval", options)
    detector, clip = worker._scorer._detector, worker._scorer._colors._clip
    for parameter in (detector._network if part == "detector" else clip._model).parameters():
        parameter.data.fill_(np.nan)
    if part == "clip":
        logits = [tensor[None] for tensor in planted(("cat", 0.9, BOXES[0]))]
        detector._forward = lambda images: logits
    with pytest.raises(RewardError, match=r"'geneval' failed: RewardError: .* not finite"):
        worker.score(noise_images(1, 64, 64), [prompt("colors", want("cat", color="red"))])


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("mouse", "horse, computer mouse"),
        ("Dinning table", "dining table"),
        ("\u200b", "person, bicycle, car"),
    ],
)
def test_unknown_classes_are_refused(name: str, near: str) -> None:
    assert isinstance(GenEvalScorer.__new__(GenEvalScorer), Scorer)
    GenEvalScorer.check(prompt("colors", want("computer mouse", color="purple")))
    with pytest.raises(ValueError, match=rf"class: expected one of 80 names such as {near}.*, got "):
        GenEvalScorer.check(prompt("single_object", want(name)))


def test_checking_prompts_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'open_clip'}"
    probe = f"import sys, rewards.scorers.geneval; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_a_detector_is_named(random_detector: Path, tmp_path: Path, tiny_clip: Path) -> None:
    model = Mask2FormerForUniversalSegmentation.from_pretrained(random_detector)
    model.config.id2label[15], model.config.id2label[64] = "feline", "rodent"
    model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(random_detector).save_pretrained(tmp_path)
    headless = shutil.copytree(random_detector, tmp_path / "headless")
    tensors = load_file(headless / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "class_predictor" not in name}
    save_file(kept, headless / "model.safetensors", metadata={"format": "pt"})
    for options, message in [
        ({"detector": str(tmp_path)}, "OSError: option detector: .* does not know cat, computer mouse"),
        ({"detector": str(headless)}, "OSError: option detector: .*2 parameters are not in .* class_pred"),
        ({"detector": "/none"}, "OSError: option detector: expected a Mask2Former .* got '/none'"),
        ({"detector": str(tiny_clip)}, "OSError: option detector: .*"),
        ({"batch": 0}, "ValueError: batch must be at least 1, got 0"),
        ({"detector_size": 0}, "ValueError: detector_size must be at least 1, got 0"),
    ]:
        with pytest.raises(RewardError, match=f"'geneval' could not be made: {message}") as caught:
            RewardWorker("geneval", options)
        assert "\n" not in str(caught.value)
