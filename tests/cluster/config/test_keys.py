"""Every key of the configuration has a description, values and a default in the help."""

from __future__ import annotations

import io
import re
import typing
from collections.abc import Iterator

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console

from cluster.config.errors import UserError
from cluster.config.key_help import print_keys
from cluster.config.keys import COMMON, Key, common, sections
from cluster.config.settings import RunSettings
from cluster.config.sources import parse_overrides, resolve


def models_of(annotation: typing.Any) -> list[type[BaseModel]]:
    """List the sections of a field: one, alternatives, or a list of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_of(part)]


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every field by its dotted name, found without the schema that the help uses."""
    for name, field in model.model_fields.items():
        listed = typing.get_origin(field.annotation) is tuple
        inner = models_of(field.annotation)
        if listed or not inner:
            yield f"{prefix}{name}", field
        for section in inner:
            yield from fields(section, f"{prefix}{name}." + ("N." if listed else ""))


KEYS = {key.name: key for section in sections() for key in section.keys}


def test_every_key_has_a_description() -> None:
    found = dict(fields(RunSettings))
    assert {"seed", "prompts.train", "selection.keep", "rewards.N.weight", "cluster.nodes"} <= found.keys()
    assert not [name for name, field in found.items() if not field.description]


def test_every_section_has_a_description() -> None:
    assert not [section.names for section in sections() if not section.description]


def test_all_keys_are_found() -> None:
    names = {name for name, _ in fields(RunSettings) if not name.startswith("eval_rewards.N.")}
    assert KEYS.keys() == names
    (listed,) = (section for section in sections() if "rewards.N" in section.names)
    assert listed.names == ("rewards.N", "eval_rewards.N")


@pytest.mark.parametrize(
    ("name", "values", "default"),
    [
        ("steps", "integer >= 1", "100"),
        ("folder", "path | none", "none"),
        ("prompts.train", "path", "required"),
        ("rollout.noise_level", "number > 0, <= 1.5", "0.7"),
        ("selection.rms_match", "true | false", "false"),
        ("selection.margin", "total | each", "total"),
        ("learner.zero_stage", "integer >= 0, <= 3", "1"),
        ("learner.betas", "list of number, number", "[0.9, 0.999]"),
        ("model.lora_targets", "list of text", "empty"),
        ("rewards", "list of tables, at least 1", "required"),
        ("rewards.N.options", "table", "empty"),
        ("cluster.dashboard_port", "integer >= 1, <= 65535 | none", "none"),
    ],
)
def test_a_key_says_what_it_takes(name: str, values: str, default: str) -> None:
    assert (KEYS[name].values, KEYS[name].default) == (values, default)


def shown(*, whole: bool) -> str:
    console = Console(file=io.StringIO(), width=110)
    print_keys(whole=whole, prog="prog", console=console)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def entry(text: str, key: Key) -> str:
    """Return the text of the help between a key's name and the next."""
    flag = key.name if ".N." in key.name else f"--{key.name}"
    found = re.search(rf"(?:^| ){re.escape(flag)} (?!\')(.*?)(?= --[a-z]| [a-z_]+\.N\.[a-z]|$)", text)
    assert found, flag
    return found[1]


def test_the_whole_help_shows_default_range_and_choices_of_every_key() -> None:
    text = shown(whole=True)
    for key in KEYS.values():
        said = entry(text, key)
        assert key.description in said
        assert f"({key.values}" in said
        assert key.default in said or "default:" in key.description


def test_the_short_help_shows_the_keys_that_are_set_most_often() -> None:
    text = shown(whole=False)
    assert [key.name for key in common()] == list(COMMON)
    assert all(f"--{name} " in text for name in COMMON)
    assert f"prog --help-all lists all {len(KEYS)}" in text
    assert len(text) < len(shown(whole=True)) / 3


def test_descriptions_are_text_and_not_markup() -> None:
    assert "[[rewards]]" in shown(whole=True)


def test_every_default_can_be_written_as_a_flag() -> None:
    """Values arrive as text: a key whose numbers are fixed choices would refuse them all."""
    plain = {
        name: key.default
        for name, key in KEYS.items()
        if key.default not in ("none", "empty", "required") and "N" not in name.split(".")
    }
    assert len(plain) > 60
    refused = {name for name, default in plain.items() if f"{name}: Input" in refusal(f"--{name}", default)}
    assert not refused


def refusal(*flags: str) -> str:
    """Return why the flags are refused, such as for contradicting another key of the preset."""
    try:
        resolve("shapes", parse_overrides(list(flags), "prog"))
    except UserError as error:
        return str(error)
    return ""
