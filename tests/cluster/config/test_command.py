"""The frame of every command: one line and one exit status for each outcome."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from cluster.config import errors
from cluster.config.command import Parser, guarded, read, required
from cluster.config.errors import DataLost, PoolError, RunFailed, RunStopped, UserError

Capture = pytest.CaptureFixture[str]


def ended(error: BaseException) -> Callable[[], int]:
    @guarded
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("steps: got 0"), 2, "error: steps: got 0\n"),
        (RunStopped("no margin"), 1, "failed: no margin\n"),
        (ExceptionGroup("", [PoolError("one"), RunStopped("two")]), 1, "failed: one\nfailed: two\n"),
        (ExceptionGroup("", [ExceptionGroup("", [PoolError("deep")])]), 1, "failed: deep\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(0), 0, ""),
    ],
)
def test_an_end_is_a_status_and_a_line(error: BaseException, status: int, said: str, capsys: Capture) -> None:
    assert ended(error)() == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "bug", [LookupError("a bug"), ExceptionGroup("", [PoolError("one"), LookupError("a bug")])]
)
def test_a_bug_passes_through(bug: Exception, capsys: Capture) -> None:
    with pytest.raises(type(bug)):
        ended(bug)()
    assert not capsys.readouterr().err


def test_every_error_that_ends_a_run_has_the_base() -> None:
    others = (UserError, DataLost)  # which end a command before a run, and take a run back
    found = [one for _, one in inspect.getmembers(errors, inspect.isclass) if one not in others]
    assert len(found) > 5
    assert not [one for one in found if not issubclass(one, RunFailed)]


def parser(**options: Any) -> Parser:
    found = Parser(prog="prog", **options)
    found.add_argument("--dry-run", action="store_true")
    return found


def test_a_command_line_is_options_a_source_and_overrides() -> None:
    options, source, overrides = read(
        parser(keys=True), ["shapes", "--dry-run", "--steps", "4", "--selection.keep", "2"]
    )
    assert (options.dry_run, source) == (True, "shapes")
    assert (overrides["steps"], overrides["selection"]["keep"]) == ("4", "2")
    assert read(parser(keys=True), ["--steps", "4"])[1] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shapes", "--dry"], "unrecognized arguments: --dry"),
        (["shapes", "--stesp", "4"], "unrecognized arguments: --stesp 4"),
        (["shapes", "--steps"], "argument --steps: expected one argument"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(parser(keys=True), arguments)


def test_a_source_that_is_missing_is_answered_with_the_presets() -> None:
    assert required("shapes") == "shapes"
    with pytest.raises(UserError, match="which preset or TOML file"):
        required(None)


@pytest.mark.parametrize(("flag", "keys"), [("--help", 25), ("--help-all", 90)])
def test_help_is_short_or_whole(flag: str, keys: int, capsys: Capture) -> None:
    @guarded
    def command() -> int:
        read(parser(keys=True), ["shapes", flag])
        raise AssertionError("help ends the command")

    assert command() == 0
    shown = capsys.readouterr().out
    assert "--dry-run" in shown
    flags = [line.split()[0] for line in shown.splitlines() if line.startswith("  --")]
    assert keys / 2 < len(flags) < 1.5 * keys


def test_a_command_without_a_configuration_has_one_help(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["-h"])
    assert "--help-all" not in capsys.readouterr().out
