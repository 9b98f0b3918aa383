"""The front door: its list, its commands, and the libraries that a help may load."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from cluster.__main__ import COMMANDS, main
from cluster.config.version import version
from tests.support.paths import ROOT

Capture = pytest.CaptureFixture[str]
HEAVY = frozenset(
    "ray torch diffusers transformers deepspeed plotly jinja2 tensorboard huggingface_hub grpc".split()
)
"""Libraries that no help needs."""
PROBE = """
import json, runpy, sys
import cluster.process
cluster.process.leave = sys.exit  # which does not end the process before it can tell
module, *arguments = sys.argv[1:]
sys.argv = [module, *arguments]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as ended:
    assert not ended.code, ended.code
print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def loaded(module: str, *arguments: str) -> tuple[str, set[str]]:
    """Run a command; return its output and the top-level modules that it loaded."""
    command = [sys.executable, "-c", PROBE, module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown, _, modules = done.stdout.rstrip("\n").rpartition("\n")
    return shown, set(json.loads(modules))


def test_the_list_names_every_command_and_loads_nothing() -> None:
    shown, modules = loaded("cluster", "--help")
    for name, (_, line) in COMMANDS.items():
        assert f"  {name:<8} {line}\n" in shown
    assert not modules & (HEAVY | {"pydantic", "rich", "numpy"})


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_loads_no_heavy_library(name: str) -> None:
    shown, modules = loaded("cluster", name, "--help")
    assert f"usage: python -m cluster {name} " in shown
    assert not modules & HEAVY


@pytest.mark.parametrize("command", ["compare", "preview", "report", "variance"])
def test_the_help_of_a_study_loads_no_heavy_library(command: str) -> None:
    shown, modules = loaded("cluster", "study", command, "--help")
    assert f"usage: python -m cluster study {command} " in shown
    assert not modules & HEAVY


def test_the_old_spelling_works_and_has_the_same_help() -> None:
    shown, modules = loaded("cluster.train", "--help-all")
    assert "usage: python -m cluster train PRESET_OR_TOML " in shown
    assert not modules & HEAVY


def test_a_module_of_the_driver_loads_neither_ray_nor_what_draws() -> None:
    probe = "import json, sys, cluster.train; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & {name.partition(".")[0] for name in json.loads(done.stdout)}


def test_a_command_gets_its_arguments_and_gives_its_status(capsys: Capture) -> None:
    assert main(["plan", "shapes", "--gpus", "none"]) == 2
    assert capsys.readouterr().err == "error: --gpus: got 'none', expected a number above 0\n"
    assert main(["train"]) == 2
    assert "which preset or TOML file? Presets are" in capsys.readouterr().err


def test_a_command_that_is_none_is_answered_with_the_list(capsys: Capture) -> None:
    assert main(["tarin"]) == 2
    assert capsys.readouterr().err == f"error: no command 'tarin'; commands are {', '.join(COMMANDS)}\n"


def test_the_version_is_printed(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"NoiseMargin {version()}")


def test_a_stop_while_modules_are_loaded_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupted(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.__main__.import_module", interrupted)
    assert main(["train", "shapes"]) == 130
    assert capsys.readouterr().out == "stopped\n"


@pytest.mark.parametrize("arguments", [["train", "--help-all"], ["bench", "--help"]])
def test_a_reader_that_closes_the_pipe_sees_no_traceback(arguments: list[str]) -> None:
    command = [sys.executable, "-u", "-m", "cluster", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert not said
