"""Tests of `rewards.check` on rewards that load and score, but with wrong weights or labels."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from rewards.check.__main__ import main
from rewards.check.known import recognised
from rewards.registry import resolve
from rewards.worker import RewardWorker
from rollout.tiny.prompt_files import FOLDER
from tests.support.reward_servers import ROOT, served

TINY = str(ROOT / "rewards" / "tiny" / "preference")
SHAPES = str(FOLDER / "shapes-train.jsonl")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules are found, in a wide terminal."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def toml(folder: Path, reward: dict[str, Any], prompts: str = SHAPES) -> str:
    path = folder / "run.toml"
    size = {"width": 32, "height": 32}
    path.write_text(tomli_w.dumps({"prompts": {"train": prompts}, "rollout": size, "rewards": [reward]}))
    return str(path)


BENCH = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
SEEING = """
import torch

from rewards.scorers.geneval import CLASSES, GenEvalScorer
from tests.support.reward_models import planted


class Seeing(GenEvalScorer):
    def __init__(self, **options):
        super().__init__(**options)
        self._detector._forward = see


def see(images):
    \"\"\"A bench in every image of a red circle, by the number that it has in the model.\"\"\"
    red = [image[..., 0].mean() > image[..., 2].mean() + 3 for image in images]
    found = [planted(("bench", 0.99 if one else 0.01, (4.0, 4.0, 60.0, 60.0))) for one in red]
    return torch.stack([classes for classes, _ in found]), torch.stack([masks for _, masks in found])
"""


@pytest.fixture
def benches(own: Path) -> Path:
    """A prompt file of COCO's world, and a scorer with a detector that sees benches."""
    (own / "benches.jsonl").write_text(json.dumps(BENCH))
    (own / "seeing_reward.py").write_text(SEEING)
    return own


def geneval(folder: Path, detector: Path, clip: Path, name: str = "seeing_reward:Seeing") -> str:
    options = {"detector": str(detector), "clip": str(clip), "detector_size": 64, "device": "cpu"}
    return toml(folder, {"name": name, "options": options}, str(folder / "benches.jsonl"))


def test_swapped_labels_of_a_detector_are_a_warning_with_a_status_of_its_own(
    benches: Path, random_detector: Path, tiny_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([geneval(benches, random_detector, tiny_clip)]) == 0
    assert "warning" not in capsys.readouterr().out
    swapped = benches / "swapped"
    shutil.copytree(random_detector, swapped)
    config = json.loads((swapped / "config.json").read_text())
    labels = config["id2label"]
    bench, bird = (next(k for k, v in labels.items() if v == name) for name in ("bench", "bird"))
    labels[bench], labels[bird] = labels[bird], labels[bench]
    (swapped / "config.json").write_text(json.dumps(config))
    assert main([geneval(benches, swapped, tiny_clip)]) == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "warning: seeing_reward:Seeing scores all images alike (0), so nothing shows that it works" in shown
    )
    assert "bring an image of its prompt 'a photo of a bench' with --image" in shown


def test_random_weights_of_a_detector_are_a_warning(
    benches: Path, random_detector: Path, tiny_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([geneval(benches, random_detector, tiny_clip, "geneval")]) == 3
    assert "warning: geneval scores all images alike" in " ".join(capsys.readouterr().out.split())


def test_random_weights_of_a_clip_are_a_warning(
    own: Path, tiny_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"clip": str(tiny_clip), "device": "cpu"}
    assert main([toml(own, {"name": "clipscore", "options": options})]) == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"warning: clipscore knew only [012] of 4 images by their prompts \(a photo of a red", shown
    )


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("shapes", {}, (32, 32)),
        ("pickscore", {"model": TINY, "processor": TINY, "device": "cpu"}, (32, 32)),
        ("ocr", {}, (48, 16)),
    ],
)
def test_rewards_that_work_know_the_images_by_their_prompts(
    name: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    found = recognised(RewardWorker(name, options), resolve(name), size)
    assert found is not None
    assert found.right == len(found.texts) == 4


def test_a_served_reward_is_asked_what_it_takes() -> None:
    with served("shapes") as server:
        found = recognised(RewardWorker("remote", {"url": server.url}), resolve("remote"), (32, 32))
    assert found is not None
    assert found.right == 4


def test_a_reward_that_does_not_look_at_prompts_knows_none() -> None:
    assert recognised(RewardWorker("jpeg", {}), resolve("jpeg"), (32, 32)) is None
