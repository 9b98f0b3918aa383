"""The sources of a configuration: presets and TOML files, overridden on the command line."""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any, Final, NoReturn

import tomli_w
from pydantic import ValidationError

from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from learner.objectives.registry import DEFAULT
from learner.settings import LearnerSettings
from rollout.retired_keys import with_moved
from rollout.settings import RolloutSettings, explain
from rollout.text_files import TextFileError, read_text
from selection.settings import SelectionSettings

PRESETS: Final = Path(__file__).parents[1] / "presets"
_MOVED: Final = {
    "rollout": RolloutSettings.moved,
    "selection": SelectionSettings.moved,
    "learner": LearnerSettings.moved,
}
_FLAGS: Final = {
    f"--{section}.{old}": f"--{section}.{new}"
    for section, moved in _MOVED.items()
    for old, new in moved.items()
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help-all lists every key)")


def preset_names() -> list[str]:
    """List the names of the bundled presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_toml(source: str) -> dict[str, Any]:
    """Read the values of a preset or of a TOML file.

    Raises:
        UserError: if the preset or file does not exist, or is not TOML.
    """
    path = Path(source) if source.endswith(".toml") else PRESETS / f"{source}.toml"
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError:
        known = ", ".join(preset_names())
        raise UserError(f"no preset or TOML file {source!r}; presets are {known}") from None
    except TextFileError as error:
        raise UserError(str(error)) from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def parse_overrides(arguments: list[str], prog: str) -> dict[str, Any]:
    """Parse ``--section.key value`` flags into nested values.

    Raises:
        UserError: if a flag is unknown or lacks its value, or a list or section is not JSON.
    """
    from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

    class CommandLine(BaseSettings, RunSettings):
        """The source of flags; never instantiated."""

        model_config = SettingsConfigDict(extra="forbid", frozen=True)

    parser = _Parser(prog=prog, allow_abbrev=False)
    flags = [argument.partition("=") for argument in arguments]
    arguments = [_FLAGS.get(flag, flag) + equals + value for flag, equals, value in flags]
    try:
        source: Any = CliSettingsSource(
            CommandLine, cli_parse_args=arguments, root_parser=parser, cli_parse_none_str="none"
        )
        return dict(source())
    except SettingsError as error:
        raise UserError(_not_json(error)) from None


def _not_json(error: Exception) -> str:
    """Describe what could not be read as JSON, in which names take quotes, as they do not in TOML."""
    cause, summary = error.__cause__, str(error).partition(" from source")[0]
    what = f"{summary}: got {cause.doc!r}: {cause}" if isinstance(cause, json.JSONDecodeError) else summary
    return f'{what}; expected JSON, such as --rewards \'[{{"name": "shapes"}}]\''


def resolve(source: str, overrides: dict[str, Any]) -> RunSettings:
    """Merge a preset or TOML file with overrides and validate the whole.

    Raises:
        UserError: naming every key that is wrong, with its value.
    """
    values = {"preset": Path(source).stem, **read_toml(source)}
    try:
        return RunSettings.model_validate(_merged(today(values), today(overrides)))
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error)}") from None


def today(values: dict[str, Any]) -> dict[str, Any]:
    """Move the keys of a configuration of an older version to their new names."""
    return values | {
        name: with_moved(values[name], moved) for name, moved in _MOVED.items() if name in values
    }


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict) and not _another(key, base[key], value)
    }
    return {**base, **over, **both}


def _another(key: str, base: dict[str, Any], over: dict[str, Any]) -> bool:
    """Return whether a section names another objective than the one before, whose keys are not its own."""
    return key == "objective" and "name" in over and over["name"] != base.get("name", DEFAULT)


def to_toml(settings: RunSettings) -> str:
    """Write the resolved configuration as TOML, which `resolve` can read again."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))
