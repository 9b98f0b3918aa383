"""Write the settings reference from the settings classes themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config.settings import RunSettings

PLAIN: Final = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", Any: "any"}
BOUNDS: Final = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
Section = tuple[str, type[BaseModel]]


def settings_reference() -> str:
    """Write all sections as Markdown: a heading and a table of keys for each."""
    return "\n\n".join(_section(name, models) for name, models in _by_name(sections()).items())


def sections() -> list[Section]:
    """List every section by its TOML heading, the run's own keys first."""
    return [("", RunSettings), *_nested(RunSettings, "")]


def keys() -> list[str]:
    """List every key by its dotted name."""
    return [f"{_dotted(name)}{key}" for name, model in sections() for key in _own(model)]


def _nested(model: type[BaseModel], prefix: str) -> Iterator[Section]:
    for key, field in model.model_fields.items():
        for inner in _models(field.annotation):
            name = f"[{prefix}{key}]"
            yield (f"[{name}]" if _listed(field.annotation) else name), inner
            yield from _nested(inner, f"{prefix}{key}.")


def _by_name(found: list[Section]) -> dict[str, list[type[BaseModel]]]:
    """Join sections that share a class, and alternatives that share a heading."""
    headings: dict[type[BaseModel], list[str]] = {}
    for name, model in found:
        headings.setdefault(model, []).append(name)
    grouped: dict[str, list[type[BaseModel]]] = {}
    for model, names in headings.items():
        grouped.setdefault(", ".join(names), []).append(model)
    return grouped


def _section(name: str, models: list[type[BaseModel]]) -> str:
    title = " and ".join(f"`{one}`" for one in name.split(", ") if one) or "The run"
    prefix = _dotted(name.split(", ", maxsplit=1)[0])
    parts = [f"## {title}"]
    for model in models:
        if len(models) > 1:
            parts.append(f"### {_choice(model)}")
        rows = [_row(prefix, key, field) for key, field in _own(model).items()]
        head = "| Key | Type and range | Default | What it sets |\n|---|---|---|---|\n"
        parts.append(head + "\n".join(rows))
    return "\n\n".join(parts)


def _row(prefix: str, key: str, field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    kind, empty, _ = _type(field.annotation).partition(" or none")
    kind = " ".join([kind, ", ".join(bounds)]).strip() + empty
    anchor = f'<span id="{prefix}{key}"></span>'
    return f"| {anchor}`{key}` | {kind} | {_default(field)} | {field.description or ''} |"


def _own(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Keep the keys that hold a value and not a section."""
    return {key: field for key, field in model.model_fields.items() if not _models(field.annotation)}


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, UnionType):
        return " or ".join("none" if one is NoneType else _type(one) for one in inner)
    if origin is tuple:
        return (
            f"list of {_type(inner[0])}" if inner[-1] is ... else f"list of {len(inner)} {_type(inner[0])}s"
        )
    if origin is dict:
        return "table"
    return PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | dict):
        return f"`{list(value)}`" if value else "empty"
    return f"`{value}`" if value != "" else "empty"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Find the sections within an annotation: a class, several alternatives, or a list of one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple):
        return [model for one in get_args(annotation) for model in _models(one)]
    return []


def _listed(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _choice(model: type[BaseModel]) -> str:
    """Name one of several alternatives by its discriminator, the first key with a single choice."""
    if model.model_config.get("extra") == "allow":
        return '`name = "module:Class"`, with keys of its own'
    for key, field in model.model_fields.items():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            return f'`{key} = "{get_args(field.annotation)[0]}"`'
    return f"`{model.__name__}`"


def _dotted(name: str) -> str:
    bare = name.strip("[]")
    return f"{bare}." if bare else ""
