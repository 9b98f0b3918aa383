"""The export command: its files, errors, model card and upload."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants
from PIL import Image

from cluster.config.sources import resolve
from cluster.export import __main__ as export
from cluster.export import steps
from cluster.export.model_card import Export, model_card
from cluster.record.checkpoints import Checkpoints
from cluster.record.run_folder import RunFolder
from tests.support.export_run import TEXT, Hub, MadeRun, make_run, running_hub
from tests.support.paths import ROOT
from tests.support.saving import flip

LORA_FILE = "pytorch_lora_weights.safetensors"
CARD = """---
license: other
license_name: some-community-licence
license_link: LICENSE.md
---
"""


@pytest.fixture(scope="module")
def lora_run(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("lora") / "run", pipeline_folder, lora_rank=4)


@pytest.fixture(scope="module")
def full_run(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("full") / "run", pipeline_folder, lora_rank=0)


def run_snippet(card: Path, folder: Path) -> np.ndarray:
    """Run a card's example unchanged, without our code, and return its image."""
    snippet = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippet) == 1
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", snippet[0]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(folder / "image.png"))


def away(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(("run", "what"), [("lora_run", "lora"), ("full_run", "pipeline")])
def test_the_snippet_of_an_averaged_export_draws_the_runs_held_out_image(
    run: str, what: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    made: MadeRun = request.getfixturevalue(run)
    out = tmp_path / "out"
    capsys.readouterr()
    assert export.main([str(made.folder), "--what", what, "--ema", "--to", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert away(run_snippet(out / "README.md", tmp_path / "elsewhere"), made.images[0]) <= 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_current_weights_of_the_newest_commit_are_the_default(lora_run: MadeRun) -> None:
    from safetensors.torch import load_file

    found = {}
    (lora_run.folder / "export/lora-step-4").mkdir(parents=True)  # an empty folder is as good as none
    for flags in ([], ["--ema"], ["--step", "2"]):
        assert export.main([str(lora_run.folder), "--what", "lora", *flags]) == 0
    for name in ("lora-step-4", "lora-step-4-ema", "lora-step-2"):
        found[name] = load_file(lora_run.folder / "export" / name / LORA_FILE)
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    current, average, older = (found[name][key] for name in found)
    assert np.allclose(current, 1.5 * average)
    assert not np.allclose(current, older)


def test_the_best_checkpoint_may_be_older(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(tmp_path / "run", pipeline_folder, lora_rank=2)
    metrics = made.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    worse = [{**line, "eval_reward": 0.9 if line["step"] == 2 else 0.1} for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in worse))
    assert export.main([str(made.folder), "--what", "lora", "--best"]) == 0
    assert (made.folder / "export/lora-step-2" / LORA_FILE).exists()
    metrics.unlink()
    said = refused(capsys, made.folder, "--what", "lora", "--best")
    assert "has no checkpoint of a step with eval_reward" in said


def test_the_card_says_what_was_done(lora_run: MadeRun, pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([str(lora_run.folder), "--what", "lora", "--ema", "--to", str(out)]) == 0
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "unknown"
    assert card.data.library_name == "diffusers"
    assert {"lora", "text-to-image"} <= set(card.data.tags)
    assert card.data.base_model is None  # a folder is no name on the hub
    for said in (
        "after step 4 of 6", "average of the weights", "| eval_reward | 0.250 | 0.650 |",
        "| metric | step 0 | step 4 |", "| eval_win_rate | 0.000 | 1.000 |", "| preset | shapes |",
        "shapes (weight 1.0)", "noise_margin: 8 of 16", "| seed | 9 |", "lora_alpha = 12",
        "learning_rate = 0.0003", "shapes-train.jsonl", "Unknown: no card",
        '"a photo of \\"two\\" red circles"',
    ):  # fmt: skip
        assert said in card.text, said
    assert TEXT not in card.text  # only as a quoted string
    toml = re.findall(r"```toml\n(.*?)```", card.text, re.DOTALL)[0]
    assert str(pipeline_folder) not in toml


def test_metrics_after_the_exported_step_are_left_out(lora_run: MadeRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([str(lora_run.folder), "--what", "lora", "--step", "2", "--to", str(out)]) == 0
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "| eval_reward | 0.250 | 0.450 |" in text
    assert "current weights, not their average" in text


def test_a_run_without_evaluations_is_exported(pipeline_folder: Path, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", pipeline_folder, lora_rank=2)
    (made.folder / "metrics.jsonl").unlink()
    for path in (made.folder / "eval").iterdir():
        path.unlink()
    assert export.main([str(made.folder), "--what", "lora"]) == 0
    card = made.folder / "export/lora-step-4/README.md"
    assert "No evaluation was recorded" in card.read_text(encoding="utf-8")
    assert "generator=" not in card.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "readme", [CARD, "no front matter\n", "---\n: : [\n---\n", "---\nlicense: mit\n---\n"]
)
def test_the_base_models_licence_is_taken_over(
    pipeline_folder: Path, lora_run: MadeRun, tmp_path: Path, readme: str
) -> None:
    card = pipeline_folder / "README.md"
    card.write_text(readme, encoding="utf-8")
    try:
        assert export.main([str(lora_run.folder), "--what", "lora", "--to", str(tmp_path / "out")]) == 0
    finally:
        card.unlink()
    data, text = ModelCard.load(tmp_path / "out/README.md").data, (tmp_path / "out/README.md").read_text()
    if "license" not in readme:
        assert data.license == "unknown"
        assert "Unknown: no card" in text
        return
    assert data.license == ("mit" if "mit" in readme else "other")
    assert data.get("license_name") == (None if "mit" in readme else "some-community-licence")
    assert data.get("license_link") is None  # it pointed into the base model's folder
    assert ("`mit`" if "mit" in readme else "`some-community-licence`") in text


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert export.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_refusals(
    lora_run: MadeRun,
    full_run: MadeRun,
    pipeline_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora = ("--what", "lora")
    assert f"{tmp_path} is not a run folder" in refused(capsys, tmp_path, *lora)
    assert "use --what pipeline" in refused(capsys, full_run.folder, *lora)
    assert "--step 6: " in (said := refused(capsys, lora_run.folder, *lora, "--step", "6"))
    assert said.rstrip().endswith("has no such checkpoint, only 2, 4")
    used = tmp_path / "used"
    used.mkdir()
    (used / "note.txt").write_text("mine")
    for folder in (used, used / "note.txt"):
        assert f"--to: {folder} is already used" in refused(capsys, lora_run.folder, *lora, "--to", folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "note.txt"]


def test_a_run_that_cannot_be_exported_is_refused(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(tmp_path / "run", pipeline_folder, lora_rank=4)
    export_lora = (made.folder, "--what", "lora", "--to", tmp_path / "out")
    config = made.folder / "config.toml"
    before = config.read_text()
    config.write_text(before.replace("lora_rank = 4", "lora_rank = 8"))
    assert "do not fit the model" in refused(capsys, *export_lora)
    config.write_text(before.replace(str(pipeline_folder), str(tmp_path / "gone")))
    assert "model.path" in refused(capsys, *export_lora)
    config.write_text(before)
    (made.folder / "checkpoints/step-4/weights.safetensors").unlink()
    said = refused(capsys, *export_lora, "--step", "4")
    assert "step-4/weights.safetensors is missing" in said
    (made.folder / "checkpoints/step-2/weights.safetensors").unlink()
    assert "step-2/weights.safetensors is missing" in refused(capsys, *export_lora)
    for marker in made.folder.rglob("COMMITTED"):
        marker.unlink()
    assert "no committed checkpoint" in refused(capsys, *export_lora)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_damaged_weights_are_passed_over_with_a_word(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(tmp_path / "run", pipeline_folder, lora_rank=4)
    flip(Checkpoints(str(made.folder / "checkpoints"), 2), 4, "weights.safetensors", bit=8 * 2000)
    export_lora = [str(made.folder), "--what", "lora"]
    assert "step-4/weights.safetensors has the CRC-32" in refused(capsys, *export_lora, "--step", "4")
    assert export.main(export_lora) == 0
    said = capsys.readouterr()
    assert said.out == f"{made.folder / 'export' / 'lora-step-2'}\n"
    assert said.err.startswith("damaged, so an older checkpoint is used: ")
    assert "step-4/weights.safetensors has the CRC-32" in said.err
    assert export.main([*export_lora, "--ema"]) == 0  # of the newest one, whose average is whole
    assert capsys.readouterr().out == f"{made.folder / 'export' / 'lora-step-4-ema'}\n"


def connect(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """Replace the real hub by the local one in this process."""
    url = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")


@pytest.mark.parametrize("card", [CARD, None])
def test_a_base_model_on_the_hub_is_named_with_its_licence(
    lora_run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str | None
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    settings = resolve(str(lora_run.folder / "config.toml"), {"model": {"path": "someone/base"}})
    order = Export(
        run=RunFolder(lora_run.folder), settings=settings, step=4, what="lora", averaged=False,
        weights=tmp_path, folder=tmp_path / "out", push=None,
    )  # fmt: skip
    with running_hub() as hub:
        hub.card = card
        connect(monkeypatch, hub)
        made = ModelCard(model_card(order, absent=(), arguments={}))
    assert made.data.base_model == "someone/base"
    assert made.data.base_model_relation == "adapter"
    assert made.data.license == ("other" if card else "unknown")
    if card:
        assert made.data.license_link == "https://huggingface.co/someone/base/blob/main/LICENSE.md"
    assert 'from_pretrained(\n    "someone/base",' in made.text


def test_nothing_leaves_the_machine_unless_asked(
    lora_run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub() as hub:
        connect(monkeypatch, hub)
        assert export.main([str(lora_run.folder), "--what", "lora", "--to", str(tmp_path / "out")]) == 0
    assert hub.calls == []


def test_an_export_that_the_hub_refuses_stays(
    lora_run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--what", "lora", "--to", str(tmp_path / "out"), "--push", "someone/some-model"]
    with running_hub(refuse=403) as hub:
        connect(monkeypatch, hub)
        assert export.main([str(lora_run.folder), *flags]) == 1
    assert ("POST", "/api/repos/create") in hub.calls
    said = capsys.readouterr().err
    assert "failed: --push someone/some-model: 403" in said
    assert f"the export is kept in {tmp_path / 'out'}" in said
    assert (tmp_path / "out" / LORA_FILE).is_file()


def test_a_push_uploads_the_folder_into_a_private_repository(lora_run: MadeRun, tmp_path: Path) -> None:
    out, name = tmp_path / "out", "someone/some-model"
    command = [sys.executable, "-m", "cluster.export", str(lora_run.folder), "--what", "lora"]
    with running_hub() as hub:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": "secret", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [*command, "--to", str(out), "--push", name],
            cwd=ROOT, capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "out"), f"{hub.address}/someone/some-model"]
    assert hub.tokens == {"Bearer secret"}
    assert len(hub.created) == 1
    assert hub.created[0]["name"] == "some-model"
    assert hub.created[0]["organization"] == "someone"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files == written
    assert b'pipe.load_lora_weights("someone/some-model")' in written["README.md"]


@pytest.mark.parametrize(
    ("name", "token", "offline", "said"),
    [
        ("someone/some-model", None, False, "no token for the hub"),
        ("some-model", "secret", False, "expected OWNER/NAME"),
        ("a/b/c", "secret", False, "--push a/b/c: "),
        ("someone/some-model", "secret", True, "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_any_work(
    lora_run: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, token: str | None, offline: bool, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(steps, "get_token", lambda: token)
    monkeypatch.setattr(steps, "is_offline_mode", lambda: offline)
    out = tmp_path / "out"
    assert said in refused(capsys, lora_run.folder, "--what", "lora", "--to", out, "--push", name)
    assert not out.exists()
