"""The frame of every command: its options, its help, its errors and its exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import wraps
from typing import Any, NoReturn, ParamSpec

from cluster.config.errors import RunFailed, UserError

P = ParamSpec("P")


class Status(IntEnum):
    """The exit statuses of all commands."""

    DONE = 0
    FAILED = 1
    """The run failed, or a plan does not fit."""
    REFUSED = 2
    """The input was wrong, and nothing was started."""
    LEARNED_NOTHING = 3
    """All steps are done, but none applied an update."""
    INTERRUPTED = 130
    """Stopped by Ctrl-C or SIGTERM."""


def guarded(main: Callable[P, int]) -> Callable[P, int]:
    """Wrap a command so that every known error ends it with one line and an exit status.

    Errors that are neither a `UserError` nor a `RunFailed`, alone or in a group, are bugs and are not caught.
    """

    @wraps(main)
    def run(*arguments: P.args, **options: P.kwargs) -> int:
        status: int
        try:
            status = main(*arguments, **options)
        except UserError as error:
            status = complain("error", error, Status.REFUSED)
        except RunFailed as error:
            status = complain("failed", error, Status.FAILED)
        except ExceptionGroup as group:
            known, rest = group.split(RunFailed)
            if known is None or rest is not None:
                raise
            status = complain("failed", known, Status.FAILED)
        except KeyboardInterrupt:
            print("stopped")
            status = Status.INTERRUPTED
        except SystemExit as ended:  # argparse has shown its help
            status = int(ended.code or 0)
        except BrokenPipeError:  # a reader such as head has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
            status = Status.DONE
        return status

    return run


def complain(kind: str, error: Exception, status: Status) -> Status:
    """Print an error, or each of a group, as one line on stderr; returns the status to end with."""
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            complain(kind, inner, status)
    else:
        print(f"{kind}: {error}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """The options of a command; a mistake is a `UserError`, and options cannot be abbreviated.

    With ``keys`` the command takes a configuration: its help lists the most common keys, and ``--help-all``
    lists every key.
    """

    def __init__(self, *, keys: bool = False, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{**settings, "allow_abbrev": False, "add_help": False})
        self.add_argument("-h", "--help", action=_Help, keys="common" if keys else "", help="show this help")
        if keys:
            self.add_argument(
                "--help-all", action=_Help, keys="all", help="show this help, with every key that can be set"
            )

    def error(self, message: str) -> NoReturn:
        """Refuse a command line.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message} (see {self.prog} --help)")


class _Help(argparse.Action):
    """An option that prints the help of a parser and the keys of the configuration, and ends the program."""

    def __init__(self, option_strings: Sequence[str], dest: str, keys: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self.keys = keys

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_help()
        if self.keys:
            from cluster.config.key_help import print_keys

            print_keys(whole=self.keys == "all", prog=parser.prog)
        parser.exit()


def program(name: str) -> str:
    """Return the command line of a command, as its help shows it."""
    return f"python -m cluster {name}"


def read(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, str | None, dict[str, Any]]:
    """Split a command line into the command's options, the source if it is given, and overrides of keys.

    The source, a preset or a TOML file, precedes any ``--section.key value``.

    Raises:
        UserError: naming the argument that is wrong.
    """
    from cluster.config.sources import parse_overrides

    options, rest = parser.parse_known_args(arguments)
    source = rest.pop(0) if rest and not rest[0].startswith("-") else None
    return options, source, parse_overrides(rest, parser.prog)


def required(source: str | None) -> str:
    """Require a source.

    Raises:
        UserError: naming the presets, if it is missing.
    """
    from cluster.config.sources import preset_names

    if source is None:
        raise UserError(f"which preset or TOML file? Presets are {', '.join(preset_names())}")
    return source
