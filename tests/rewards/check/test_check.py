from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from PIL import ExifTags, Image

from rewards.check.__main__ import _load, main
from rewards.check.pictures import picture
from rewards.check.trial import Failure, Trial, try_out
from rollout.prompts import load_prompts
from rollout.records import Prompt
from rollout.tiny.prompt_files import FOLDER
from tests.support.reward_models import png
from tests.support.reward_servers import ROOT, served

SHAPES = str(FOLDER / "shapes-train.jsonl")
OWN = """
import os

import numpy as np

from rewards.scorer import Judgement, Traits


class Own:
    traits = Traits(low=0.0, high=1.0)

    def __init__(self, does="score"):
        self.does = does
        if does == "import":
            import no_such_package
        if does == "weights":
            open("/no/such/weights.safetensors")
        if does == "die":
            os._exit(9)

    def __call__(self, images, prompts):
        values = images.mean(axis=(1, 2, 3)) / 255 * (3 if self.does == "leave" else 1)
        valid = np.full(len(images), self.does != "miss")
        valid[0] = len(images) != 3  # blank, noise and real
        return Judgement(values=values, valid=valid)

    @classmethod
    def check(cls, prompt):
        if prompt.text in ("a cat", "a dog"):
            raise ValueError("expected a circle")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "checked_reward.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def toml(folder: Path, *rewards: dict[str, Any], **sections: Any) -> str:
    path = folder / "run.toml"
    values = {
        "prompts": {"train": SHAPES, "eval": "unused"},
        "model": {"path": "no/such/model"},
        "rollout": {"width": 32, "height": 32},
        "rewards": list(rewards),
        **sections,
    }
    path.write_text(tomli_w.dumps(values))
    return str(path)


def trial(name: str, **options: Any) -> Trial | Failure:
    return try_out(name, options, load_prompts(Path(SHAPES)), (32, 32), None)


def test_a_preset_is_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["shapes"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "shapes" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:5] == ["shapes", "0 to 1", "0.000", "0.000", "1.000"]
    assert 0.03 < float(cells[7]) < 2


def test_every_reward_of_a_configuration_is_tried_once(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [{"name": "jpeg"}, {"name": "checked_reward:Own"}]
    held_out = [{"name": "jpeg"}, {"name": "checked_reward:Own", "options": {"does": "leave"}}]
    assert main([toml(own, *both, eval_rewards=held_out)]) == 1
    shown = capsys.readouterr().out
    assert shown.count("jpeg") == 1
    assert "missing" in shown
    assert "checked_reward:Own (eval): scored 1.49" in shown
    assert "but declares 0 to 1" in shown


def test_scores_seconds_and_memory_are_measured(own: Path) -> None:
    result = trial("checked_reward:Own")
    assert isinstance(result, Trial)
    assert np.isnan(result.scores[0])
    assert result.scores[1] == pytest.approx(0.5, abs=0.02)
    assert result.fault == ""
    assert 0 < result.seconds_per_image < 1
    assert 0.03 < result.memory_gb < 1.5


@pytest.mark.parametrize(
    ("name", "options", "reason", "advice"),
    [
        ("checked_reward:Own", {"does": "import"}, "named 'no_such_package'", "install the package"),
        ("checked_reward:Own", {"does": "weights"}, "/no/such/weights", "put the weights there"),
        ("checked_reward:Own", {"does": "die"}, "its process was killed", "memory enough"),
        ("own_absent.part:Own", {}, "cannot import 'own_absent.part'", "put own_absent.part into the folder"),
        ("remote", {"url": "http://127.0.0.1:9"}, "ConnectError", "start the server"),
        ("ocr", {}, r"(\d+) of \1 prompts do not suit reward ocr: .*-train.jsonl:1: expected a text", ""),
        ("jpeg", {"quality": 3}, "unexpected keyword argument 'quality'", ""),
    ],
)  # fmt: skip
def test_a_failure_comes_with_advice(own: Path, name: str, options: Any, reason: str, advice: str) -> None:
    result = trial(name, **options)
    assert isinstance(result, Failure)
    assert re.search(reason, result.reason), result
    assert advice in result.advice
    assert bool(advice) == bool(result.advice)


def test_missing_weights_end_the_command_with_advice(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = {"name": "checked_reward:Own", "options": {"does": "weights"}}
    assert main([toml(own, {"name": "jpeg"}, lost)]) == 1
    shown = capsys.readouterr().out
    assert "failed" in shown
    assert "hf download" in shown


def test_a_reward_that_scores_nothing_is_a_fault(own: Path) -> None:
    result = trial("checked_reward:Own", does="miss")
    assert isinstance(result, Trial)
    assert result.fault == "scored none of the images"


def test_prompts_that_do_not_suit_are_named_by_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own / "prompts.txt"
    path.write_text("\na cat\na circle\n" + "a dog\n" * 11)
    assert main([toml(own, {"name": "checked_reward:Own"}, prompts={"train": str(path)})]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "0 to 1" in shown  # what suits is tried all the same
    assert "12 of 13 prompts do not suit reward checked_reward:Own:" in shown
    places = re.findall(r"prompts\.txt:(\d+): expected a circle", shown)
    assert places == ["2", *map(str, range(4, 13))]
    assert shown.endswith("; and 2 more")


def test_a_served_reward_shows_its_own_range(own: Path) -> None:
    with served("shapes") as server:
        result = trial("remote", url=server.url)
    assert isinstance(result, Trial)
    assert (result.traits.low, result.traits.high) == (0.0, 1.0)
    assert result.scores == (0.0, 0.0, 1.0)


def test_an_image_of_ones_own_is_the_real_one(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (300, 200), 51).save(own / "grey.png")
    assert main([toml(own, {"name": "checked_reward:Own"}), "--image", str(own / "grey.png")]) == 0
    assert "0.200" in capsys.readouterr().out


def test_a_transparent_image_lies_on_white(tmp_path: Path) -> None:
    half = np.zeros((8, 8, 4), np.uint8)
    half[:4] = (250, 0, 0, 255)  # below it is transparent, and black where nobody looks
    Image.fromarray(half).save(tmp_path / "half.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 90, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    loaded = _load(tmp_path / "half.png", (8, 8))
    assert loaded[0, 0].tolist() == [250, 0, 0]
    assert loaded[7, 7].tolist() == [255, 255, 255]
    assert (_load(tmp_path / "palette.png", (8, 8)) == 255).all()


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    lying = np.zeros((8, 16, 3), np.uint8)
    lying[:, :8] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn clockwise shows it upright
    Image.fromarray(lying).save(tmp_path / "turned.png", exif=exif)
    shown = _load(tmp_path / "turned.png", (8, 16))
    assert shown.shape == (16, 8, 3)
    assert (shown[:8] == 255).all()
    assert (shown[8:] == 0).all()


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_sixteen_bits_become_eight(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "deep.png"
    if kind == "grey":
        Image.fromarray(np.full((8, 8), 100 * 256 + 200, np.uint16)).save(path)
    else:
        path.write_bytes(png(8, 16, zlib.compress((b"\0" + bytes([100, 200] * 24)) * 8)))
    assert (_load(path, (8, 8)) == 100).all()


def test_an_image_of_no_known_range_is_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(own / "float.tiff")
    configured = toml(own, {"name": "checked_reward:Own"})
    assert main([configured, "--image", str(own / "float.tiff")]) == 2
    assert "float.tiff: expected 8 or 16 bits per channel, got F, 32 bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "metadata", "size"),
    [
        ('a sign that says "ink"', {}, (48, 16)),
        ('a large poster: "Open All Day"', {}, (512, 512)),
        ("x", {"text": "exit"}, (96, 32)),
    ],
)
def test_the_drawn_text_can_be_read(text: str, metadata: dict[str, Any], size: tuple[int, int]) -> None:
    from rewards.scorers.ocr import OcrScorer

    prompt = Prompt(index=0, text=text, metadata=metadata)
    scorer = OcrScorer(mode="full" if size[0] > 100 else "recognition")
    assert scorer(picture(prompt, size)[None], [prompt]).values.tolist() == [1.0]


def test_a_prompt_of_another_world_gets_some_picture() -> None:
    image = picture(Prompt(index=0, text="a photo of a bench"), (64, 48))
    assert image.shape == (48, 64, 3)
    assert (image[..., 0] > image[..., 2] + 100).mean() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [{"name": "jpeg", "worker": 2}]}, "unknown key rewards.0.worker"),
        ({"rewards": []}, "rewards: Tuple should have at least 1 item"),
        ({"rollout": {"width": -1}}, "rollout.width: .*got -1"),
        ({"prompts": {"train": "no/such.jsonl"}}, "no/such.jsonl: cannot read the prompt file"),
        ({"prompts": {}}, "prompts.train is missing"),
    ],
)
def test_a_bad_configuration_is_refused(
    own: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([toml(own, **{"rewards": [{"name": "jpeg"}], **change})]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_unknown_preset_and_broken_toml_are_refused(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shape"]) == 2
    assert "no preset or TOML file 'shape'; presets are flux-pickscore, klein" in capsys.readouterr().err
    (own / "utf16.toml").write_text("[[rewards]]", encoding="utf-16")
    assert main([str(own / "utf16.toml")]) == 2
    assert f"error: {own / 'utf16.toml'}: is UTF-16; save it as UTF-8\n" == capsys.readouterr().err
    (own / "broken.toml").write_text("[[rewards")
    assert main([str(own / "broken.toml")]) == 2
    assert "broken.toml" in capsys.readouterr().err
