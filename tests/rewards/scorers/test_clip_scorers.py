from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from rewards.models import open_clip as open_clip_models
from rewards.scorer import RewardError, Scorer
from rewards.scorers.aesthetic import AestheticScorer
from rewards.scorers.clipscore import ClipScoreScorer
from rewards.scorers.hpsv2 import HpsV2Scorer
from rewards.worker import RewardWorker
from rollout.records import Prompt
from tests.support.reward_models import INCEPTION, noise_images

TEXTS = ("a red cat", "two dogs", "a red cat", "a boat left of a zebra", "x " * 200)
Tensors = dict[str, torch.Tensor]


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(index=i, text=text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def reference(tiny_clip: Path) -> Callable[[Image.Image, str], tuple[NDArray[Any], float]]:
    """One image and one text at a time by open_clip's own means: the image's unit vector and the cosine."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tiny_clip}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_clip}")

    @torch.inference_mode()
    def score(image: Image.Image, text: str) -> tuple[NDArray[Any], float]:
        features = model.encode_image(preprocess(image)[None], normalize=True)[0]
        words = model.encode_text(tokenizer([text]), normalize=True)[0]
        return features.numpy(), float(features @ words)

    return score


@pytest.fixture(scope="module")
def hps_weights(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint as the authors save theirs."""
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    state = load_file(tiny_clip / "open_clip_model.safetensors")
    torch.save({"epoch": 1, "name": "tiny", "state_dict": state}, path)
    return str(path)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head with the tensors of the published one."""
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for layer, (rows, columns) in sizes.items():
        tensors[f"layers.{layer}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        tensors[f"layers.{layer}.bias"] = torch.randn(rows, generator=generator)
    path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(tensors, path)
    save_file(tensors, path.with_suffix(".safetensors"))
    return path


@pytest.fixture(scope="module")
def clipscore(tiny_clip: Path) -> ClipScoreScorer:
    return ClipScoreScorer(clip=str(tiny_clip), device="cpu")


@pytest.fixture(scope="module")
def hpsv2(hps_weights: str, tiny_architecture: str) -> Iterator[HpsV2Scorer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewards.scorers.hpsv2.ARCHITECTURE", tiny_architecture)
        yield HpsV2Scorer(weights=hps_weights, device="cpu")


@pytest.fixture(scope="module")
def aesthetic(head: Path, tiny_clip: Path) -> AestheticScorer:
    return AestheticScorer(head=str(head), clip=str(tiny_clip), device="cpu")


def test_clipscore_is_its_formula(clipscore: ClipScoreScorer, reference: Any) -> None:
    images = noise_images(5)
    cosines = [reference(Image.fromarray(i), text)[1] for i, text in zip(images, TEXTS, strict=True)]
    assert min(cosines) < 0 < max(cosines)
    judgement = clipscore(images, prompts(*TEXTS))
    np.testing.assert_allclose(judgement.values, 2.5 * np.maximum(cosines, 0), atol=1e-5)
    assert judgement.valid.all()
    assert judgement.values.dtype == np.float64


def test_hpsv2_is_the_cosine(hpsv2: HpsV2Scorer, reference: Any) -> None:
    images = noise_images(5)
    cosines = [reference(Image.fromarray(i), text)[1] for i, text in zip(images, TEXTS, strict=True)]
    judgement = hpsv2(images, prompts(*TEXTS))
    np.testing.assert_allclose(judgement.values, cosines, atol=1e-5)
    assert judgement.valid.all()


def test_hpsv2_pads_what_is_not_square_and_clipscore_crops_it(
    hpsv2: HpsV2Scorer, clipscore: ClipScoreScorer, reference: Any
) -> None:
    wide = noise_images(1, height=32, width=64)
    image = Image.fromarray(wide[0])
    padded = Image.new("RGB", (32, 32))
    padded.paste(image.resize((32, 16), Image.Resampling.BICUBIC), (0, 8))
    cropped = image.crop((16, 0, 48, 32))
    [text] = prompts("a boat")
    assert hpsv2(wide, [text]).values[0] == pytest.approx(reference(padded, "a boat")[1], abs=1e-5)
    cosine = reference(cropped, "a boat")[1]
    assert clipscore(wide, [text]).values[0] == pytest.approx(2.5 * max(cosine, 0), abs=1e-5)
    assert cosine != pytest.approx(reference(padded, "a boat")[1], abs=1e-3)


def test_aesthetic_is_the_linear_head_on_the_unit_vector(
    aesthetic: AestheticScorer, head: Path, reference: Any
) -> None:
    images = noise_images(4)
    tensors = {
        name: tensor.double().numpy() for name, tensor in load_file(head.with_suffix(".safetensors")).items()
    }
    expected = []
    for image in images:
        vector = reference(Image.fromarray(image), "")[0].astype(np.float64)
        for layer in (0, 2, 4, 6, 7):
            vector = tensors[f"layers.{layer}.weight"] @ vector + tensors[f"layers.{layer}.bias"]
        expected.append(vector[0])
    judgement = aesthetic(images, prompts(*TEXTS[:4]))
    np.testing.assert_allclose(judgement.values, expected, atol=1e-4)
    assert np.ptp(expected) > 0.01
    assert judgement.valid.all()
    AestheticScorer.check(prompts("")[0])


def test_a_head_may_come_without_pickle(aesthetic: AestheticScorer, head: Path, tiny_clip: Path) -> None:
    other = AestheticScorer(head=str(head.with_suffix(".safetensors")), clip=str(tiny_clip), device="cpu")
    images, asked = noise_images(2), prompts("a", "b")
    assert other(images, asked).values.tolist() == aesthetic(images, asked).values.tolist()


def test_an_architecture_with_a_weight_file_is_the_same_model(
    clipscore: ClipScoreScorer, tiny_clip: Path, tiny_architecture: str
) -> None:
    weights = str(tiny_clip / "open_clip_model.safetensors")
    other = ClipScoreScorer(clip=tiny_architecture, clip_weights=weights, device="cpu")
    images, asked = noise_images(3), prompts(*TEXTS[:3])
    assert other(images, asked).values.tolist() == clipscore(images, asked).values.tolist()


@pytest.mark.parametrize("name", ["clipscore", "hpsv2", "aesthetic"])
def test_each_pair_is_scored_alone(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = request.getfixturevalue(name)
    assert isinstance(scorer, Scorer)
    images, asked = noise_images(5), prompts(*TEXTS)
    together = scorer(images, asked).values
    alone = [scorer(images[i : i + 1], asked[i : i + 1]).values[0] for i in range(5)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    monkeypatch.setattr(open_clip_models, "_AT_ONCE", 2)
    np.testing.assert_allclose(scorer(images, asked).values, together, atol=1e-5)


def test_a_repeated_prompt_is_encoded_once(
    clipscore: ClipScoreScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[list[str]] = []
    encode = clipscore._clip.texts
    monkeypatch.setattr(clipscore._clip, "texts", lambda texts: encoded.append(texts) or encode(texts))
    clipscore(noise_images(5), prompts(*TEXTS))
    assert encoded == [[TEXTS[0], TEXTS[1], TEXTS[3], TEXTS[4]]]


@pytest.fixture
def again(tiny_clip: Path, head: Path, hps_weights: str) -> Callable[[Any], Any]:
    """Makes a scorer anew, on the device that it picks."""
    options: dict[type, dict[str, str]] = {
        ClipScoreScorer: {"clip": str(tiny_clip)},
        HpsV2Scorer: {"weights": hps_weights},
        AestheticScorer: {"clip": str(tiny_clip), "head": str(head)},
    }
    return lambda scorer: type(scorer)(**options[type(scorer)])


@pytest.mark.parametrize("name", ["clipscore", "hpsv2", "aesthetic"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_is_near(
    name: str, device: str, again: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = request.getfixturevalue(name)
    if device == "cpu":
        monkeypatch.setattr(open_clip_models, "placed", lambda _: (torch.device("cpu"), torch.bfloat16))
    reduced = again(exact)
    assert reduced._clip.device.type == device
    assert reduced._clip._model.visual.conv1.weight.dtype == torch.bfloat16
    images, asked = noise_images(5), prompts(*TEXTS)
    near, values = reduced(images, asked).values, exact(images, asked).values
    np.testing.assert_allclose(near, values, atol=0.05)
    assert near.tolist() != values.tolist()


def test_broken_weights_make_scores_missing_and_not_zero(tiny_clip: Path) -> None:
    worker = RewardWorker("clipscore", {"clip": str(tiny_clip), "device": "cpu"})
    worker._scorer._clip._model.visual.proj.data[:] = np.nan
    judgement = worker.score(noise_images(2), prompts("a", "b"))
    assert not judgement.valid.any()


def test_prompts_need_a_text() -> None:
    for scorer in (ClipScoreScorer, HpsV2Scorer):
        scorer.check(prompts("x")[0])
        with pytest.raises(ValueError, match=r"^expected a text, got ' '"):
            scorer.check(prompts(" ")[0])


class Evil:
    """Would leave a trace when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def broken(tmp_path: Path, tiny_clip: Path) -> dict[str, str]:
    """Weights that cannot be used, each for a reason of its own."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "open_clip_config.json").write_text(
        (tiny_clip / "open_clip_config.json").read_text()
    )
    torch.save(Evil(tmp_path / "trace"), tmp_path / "evil.pth")
    torch.save({"layers.0.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    (tmp_path / "text.safetensors").write_text("not tensors")
    found = {path.name: str(path) for path in tmp_path.iterdir()}
    shutil.copy(tiny_clip / "open_clip_config.json", tmp_path)  # says what these weights would need
    return found


CASES = [
    ("clipscore", {"clip": "ViT-Z-1"}, "option clip: expected an open_clip architecture .* got 'ViT-Z-1'"),
    ("clipscore", {"clip_weights": "/none.pt"}, "option clip_weights: .* local file, got '/none.pt'"),
    ("clipscore", {"clip": "bare"}, "option clip: .*bare.*could not be loaded"),
    ("clipscore", {"clip": "tiny-clip", "clip_weights": "other.pth"}, "option clip_weights: .*other.pth"),
    ("clipscore", {"clip": "tiny-clip", "clip_weights": "evil.pth"}, "option clip_weights: .*evil.pth"),
    ("aesthetic", {}, "option head: expected the path of sac.*linearMSE.pth .* got None"),
    ("aesthetic", {"head": "/none.pth"}, "option head: .* got '/none.pth' .*No such file"),
    ("aesthetic", {"head": "other.pth"}, "option head: .*other.pth.*Missing key"),
    ("aesthetic", {"head": "evil.pth"}, "option head: .*evil.pth"),
    ("aesthetic", {"head": "text.safetensors"}, "option head: .*text.safetensors"),
    ("hpsv2", {"weights": "/none.pt"}, "option weights: expected a local HPS_v2.1.* got '/none.pt'"),
    ("hpsv2", {"weights": "other.pth"}, "option weights: .*other.pth"),
    ("pickscore", {"model": "/none"}, "option model: expected a CLIP model .* got '/none'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "message"), CASES)
def test_what_cannot_be_loaded_is_one_line_with_the_option(
    name: str,
    options: dict[str, str],
    message: str,
    broken: dict[str, str],
    tiny_architecture: str,
    tmp_path: Path,
) -> None:
    named = {option: broken.get(value, value) for option, value in options.items()}
    with pytest.raises(RewardError, match=rf"'{name}' could not be made: OSError: ({message})") as caught:
        RewardWorker(name, named | {"device": "cpu"})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()


def test_weights_of_another_gelu_are_refused(
    tiny_clip: Path, tiny_architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = str(tiny_clip / "open_clip_model.safetensors")
    published = {"plain": {"file": weights, "quick_gelu": False, **INCEPTION}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_architecture, published)
    with pytest.raises(OSError, match=r"option clip_weights: .*QuickGELU mismatch"):
        ClipScoreScorer(clip=tiny_architecture, clip_weights="plain")


def test_the_hub_is_asked_for_the_published_file(
    hps_weights: str, tiny_architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewards.scorers.hpsv2.ARCHITECTURE", tiny_architecture)
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *where: asked.append(where) or hps_weights)
    HpsV2Scorer(device="cpu")
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt")]


def test_the_published_names_are_known_to_open_clip() -> None:
    cfg = open_clip.get_pretrained_cfg("ViT-L-14-quickgelu", "openai")
    assert cfg["quick_gelu"]
    assert open_clip.get_model_config("ViT-L-14-quickgelu")["embed_dim"] == 768
    assert open_clip.get_model_config("ViT-H-14")["embed_dim"] == 1024
