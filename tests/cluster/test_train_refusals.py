"""Bad input on the command line: one line on stderr, status 2, and nothing is started."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.config.sources import resolve
from cluster.train import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def refuse(
    model_folder: Path, capsys: Capture, set_free_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run the command line, expect a refusal, and return its one line."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    set_free_memory(64)

    def run(*flags: str, preset: str = "shapes", model: Path | str = model_folder) -> str:
        capsys.readouterr()
        status = main([preset, "--model.path", str(model), *flags])
        shown = capsys.readouterr()
        assert status == 2
        assert shown.err.startswith("error: ")
        assert shown.err.count("\n") == 1
        assert "Traceback" not in shown.err + shown.out
        assert not ray.is_initialized()
        return shown.err

    return run


def test_unknown_preset(refuse: Callable[..., str]) -> None:
    assert "no preset or TOML file 'nonesuch'; presets are" in refuse(preset="nonesuch")


def test_unknown_flag(refuse: Callable[..., str]) -> None:
    assert "--selection.kepe" in refuse("--selection.kepe", "3")


def test_no_preset(capsys: Capture) -> None:
    assert main([]) == 2
    assert "which preset or TOML file? Presets are" in capsys.readouterr().err


def test_broken_line_of_a_prompt_file(refuse: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a photo of a circle"}\n\n{"prompt": \n')
    assert f"{path}:3: not JSON" in refuse("--prompts.train", str(path))
    path.write_text('{"prompt": "a photo of a circle"}\n{"text": "a"}\n')
    assert f'{path}:2: expected an object with a non-empty string "prompt"' in refuse(
        "--prompts.eval", str(path)
    )


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.txt", "prompts.csv"])
def test_prompt_file_that_is_none(refuse: Callable[..., str], tmp_path: Path, name: str) -> None:
    assert str(tmp_path / name) in refuse("--prompts.train", str(tmp_path / name))


def test_empty_prompt_file(refuse: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n")
    assert f"{path}: holds no prompt" in refuse("--prompts.train", str(path))


def test_prompt_that_does_not_suit_the_reward(refuse: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('a sign that says "yes"\na sign without words\n')
    line = refuse("--prompts.train", str(path), "--prompts.eval", str(path), "--rewards", '[{"name": "ocr"}]')
    assert f"1 of 2 prompts do not suit reward ocr: {path}:2: expected a text to write" in line
    assert "a sign without words" in line


def test_prompts_that_do_not_suit_are_named_by_line(refuse: Callable[..., str], tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.txt", tmp_path / "eval.txt"
    train.write_text('\na sign "yes"\n\na sign\n')
    held_out.write_text('a sign "no"\n' + "a sign\n" * 12)
    flags = ["--prompts.train", str(train), "--prompts.eval", str(held_out), "--rewards", '[{"name": "ocr"}]']
    line = refuse(*flags)
    assert f"13 of 15 prompts do not suit reward ocr: {train}:4: expected a text" in line
    assert [number for number in range(1, 15) if f"{held_out}:{number}: " in line] == list(range(2, 11))
    assert line.endswith("; and 3 more\n")
    assert "prompt 1" not in line


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"exclude": None}, "exclude: expected a list of objects, got None"),
        ({"exclude": 5}, "exclude: expected a list of objects, got 5"),
        ({"exlude": []}, "unknown key 'exlude'; did you mean exclude?"),
        ({"include": [{"class": "circle", "count": 1, "colour": "red"}]}, "include[0]: unknown key 'colour'"),
    ],
)
def test_metadata_that_nobody_can_judge_by(
    refuse: Callable[..., str], tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    good = {"prompt": "a", "tag": "colors", "include": [{"class": "circle", "count": 1}]}
    path.write_text(json.dumps(good) + "\n\n" + json.dumps({**good, **wrong}))
    line = refuse("--prompts.train", str(path), "--dry-run")
    assert f"prompts do not suit reward shapes: {path}:3: metadata" in line
    assert said in line


def test_every_broken_line_of_a_prompt_file(refuse: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n[]\n' + "{}\n" * 10)
    line = refuse("--prompts.train", str(path))
    assert f"error: {path}:3: not JSON" in line
    assert [number for number in range(1, 16) if f"{path}:{number}: " in line] == list(range(3, 13))
    assert line.endswith("; and 2 more\n")


def test_model_folder_that_is_none(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert f"model.path: {tmp_path} is not a diffusers pipeline" in refuse(model=tmp_path)
    assert f"model.path: {tmp_path / 'none'} is neither a folder nor" in refuse(model=tmp_path / "none")


def test_model_of_another_family(refuse: Callable[..., str], model_folder: Path) -> None:
    (model_folder / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    line = refuse()
    assert f"{model_folder} is a OtherPipeline; supported are StableDiffusion3Pipeline" in line


def test_unknown_reward(refuse: Callable[..., str]) -> None:
    assert "unknown reward 'nonesuch'" in refuse("--rewards", '[{"name": "nonesuch"}]')
    assert "no.such.module" in refuse("--rewards", '[{"name": "no.such.module:Scorer"}]')


def test_unwritable_run_folder(refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    assert f"folder: cannot write {folder}" in refuse("--folder", str(folder))


@pytest.mark.parametrize("used", ["a folder", "a file"])
def test_used_run_folder(refuse: Callable[..., str], tmp_path: Path, used: str) -> None:
    folder = tmp_path / "run"
    if used == "a folder":
        folder.mkdir()
        (folder / "metrics.jsonl").touch()
    else:
        folder.touch()
    assert f"folder: {folder} is already used" in refuse("--folder", str(folder))


def test_dashboard_port_in_use(refuse: Callable[..., str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cluster.dashboard_port: port {port} is not free" in refuse(
            "--cluster.dashboard_port", str(port)
        )


def test_more_samplers_to_begin_with_than_there_can_be(refuse: Callable[..., str]) -> None:
    assert "rollout: min_workers must be at most workers = 2, got 3" in refuse("--rollout.min_workers", "3")


def test_too_little_memory(refuse: Callable[..., str], set_free_memory: Any) -> None:
    set_free_memory(1.5)
    line = refuse()
    assert "1.5 GB are free" in line
    assert "2 rollout" in line
    assert "rollout.workers" in line


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--selection.keep", "7"], "must be even"),
        (["--selection.keep", "32"], "at most selection.candidates (16), got 32"),
        (["--learner.offload", "parameters"], "offload = 'parameters' needs zero_stage 3, got 1"),
        (["--steps", "x"], "steps"),
    ],
)
def test_values_that_do_not_fit(refuse: Callable[..., str], flags: list[str], part: str) -> None:
    assert part in refuse(*flags)


def test_a_store_that_nothing_reaches(refuse: Callable[..., str]) -> None:
    said = refuse("--checkpoints", "nosuch://bucket/runs")
    assert "checkpoints: cannot reach nosuch://bucket/runs: Protocol not known: nosuch" in said


def test_a_deepspeed_json_that_collides(refuse: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": 7}')
    said = refuse("--learner.deepspeed", str(path))
    assert f"learner.deepspeed: {path}: gradient_clipping is 7, but the run's own keys say 1.0" in said


def test_resume_of_a_folder_that_is_no_run(tmp_path: Path, capsys: Capture) -> None:
    assert main(["--resume", str(tmp_path / "none")]) == 2
    assert f"--resume: {tmp_path / 'none'} is not a run folder" in capsys.readouterr().err
    assert main(["shapes", "--resume", str(tmp_path)]) == 2
    assert "leave the preset out" in capsys.readouterr().err


def test_resume_without_a_checkpoint(
    model_folder: Path, tmp_path: Path, capsys: Capture, set_free_memory: Any
) -> None:
    set_free_memory(64)
    assert main(["shapes", "--model.path", str(model_folder), "--dry-run"]) == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(configuration(capsys.readouterr().out))
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert f"{tmp_path / 'run' / 'checkpoints'} has no committed checkpoint" in capsys.readouterr().err


def configuration(shown: str) -> str:
    """Return the TOML part of a dry run's output: everything before the plan."""
    return shown[: shown.index("\nplan")]


def test_dry_run_prints_a_configuration_that_loads_again_and_starts_nothing(
    model_folder: Path, tmp_path: Path, capsys: Capture, set_free_memory: Any
) -> None:
    set_free_memory(64)
    folder = tmp_path / "run"
    flags = [
        "--steps",
        "9",
        "--selection.keep",
        "4",
        "--model.path",
        str(model_folder),
        "--folder",
        str(folder),
    ]
    assert main(["shapes", *flags, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert not shown.err
    assert not ray.is_initialized()
    assert not folder.exists()
    path = tmp_path / "again.toml"
    path.write_text(configuration(shown.out))
    again = resolve(str(path), {})
    assert (again.steps, again.selection.keep, again.folder) == (9, 4, folder)
    assert again.model.path == str(model_folder)
    assert "candidates sampled" in shown.out


@pytest.mark.ray
def test_a_run_without_room_leaves_no_folder(model_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "run"
    asked = ["shapes", "--model.path", str(model_folder), "--rollout.gpus", "512", "--folder", str(folder)]
    for _ in range(2):
        assert main(asked) == 2
        said = capsys.readouterr().err
        assert (
            "the cluster lacks resources for the run after 5 s: GPUs: 1024 needed (rollout 2 x 512)" in said
        )
        assert not folder.exists()
