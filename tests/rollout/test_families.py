"""Which folders are models that we can train, and what the others are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout.families import FAMILIES, ModelFolderError, family_of


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_saved_pipeline_names_its_family(pipeline_folder: Path) -> None:
    assert family_of(str(pipeline_folder)) == FAMILIES["StableDiffusion3Pipeline"]


@pytest.mark.parametrize(
    "index",
    [None, "{", "{}", "[]", '"StableDiffusion3Pipeline"'],
    ids=["missing", "broken", "empty", "list", "string"],
)
def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ModelFolderError) as caught:
        family_of(str(tmp_path))
    assert f"model.path: {tmp_path} is not a diffusers pipeline" in str(caught.value)
    assert "model_index.json" in str(caught.value)


@pytest.mark.parametrize("name", ['"FluxPipeline"', '["my_pipeline", "FluxPipeline"]'])
def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": {name}}}')
    with pytest.raises(ModelFolderError, match=r"FluxPipeline.*supported are StableDiffusion3Pipeline"):
        family_of(str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", ["no/such/folder/anywhere", "nobody/has-this-model", "bad name!"])
def test_neither_a_folder_nor_a_model(path: str) -> None:
    with pytest.raises(ModelFolderError) as caught:
        family_of(path)
    assert str(caught.value).startswith(f"model.path: {path} is neither a folder nor a reachable model: ")
