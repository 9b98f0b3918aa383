"""The command that encodes a run's prompts beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.embed import main


def test_all_prompts_of_a_run_are_encoded_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("train", "a red circle\na blue cross\n"), ("eval", "a red circle\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    arguments = [
        "words", "--prompts.train", str(tmp_path / "train.txt"), "--prompts.eval", str(tmp_path / "eval.txt"),
        "--rollout.embeddings", str(tmp_path / "embeddings"),
    ]  # fmt: skip
    for _ in range(2):
        assert main(arguments) == 0
        assert f"2 prompts are in {tmp_path / 'embeddings'}" in capsys.readouterr().out
        assert len(list((tmp_path / "embeddings").glob("*.safetensors"))) == 2


def test_without_a_folder_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shapes"]) == 2
    assert "rollout.embeddings: expected the folder for the embeddings" in capsys.readouterr().err
