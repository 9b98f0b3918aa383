"""Every key of the configuration with its values, default and description, read from the settings' schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from cluster.config.settings import RunSettings

COMMON: Final = (
    "folder", "steps", "seed", "groups_per_step", "prompts.train", "prompts.eval", "model.path",
    "model.lora_rank", "rollout.width", "rollout.height", "rollout.steps", "rollout.workers", "rollout.gpus",
    "selection.candidates", "selection.keep", "selection.strategy", "learner.learning_rate", "learner.ranks",
    "learner.gpus", "rewards", "cluster.address",
)  # fmt: skip
"""The most common keys."""
ENTRY: Final = "N"
"""The placeholder for the number of an entry in a name, as in ``rewards.N.weight``."""
BOUNDS: Final = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
TYPES: Final = {"string": "text", "boolean": "true | false", "object": "table", "null": "none"}

Schema = Mapping[str, Any]
"""A JSON schema, or a part of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key by its dotted name, with its values, default and description as text."""

    name: str
    values: str
    default: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The keys below one name, or those of a run itself; equal sections, as of two lists, are merged."""

    names: tuple[str, ...]
    description: str
    keys: tuple[Key, ...]


def sections() -> tuple[Section, ...]:
    """List the sections of the configuration, a run's own keys first."""
    schema = RunSettings.model_json_schema()
    named: dict[str, list[str]] = {}
    for name, reference in _nested("", schema, schema["$defs"]):
        named.setdefault(reference, []).append(name)
    found = [_section([""], schema)]
    found += [_section(names, schema["$defs"][reference]) for reference, names in named.items()]
    return tuple(_each_key_once(found))


def _each_key_once(found: Sequence[Section]) -> Iterator[Section]:
    """Leave out what an alternative of a section repeats, such as the name of an objective."""
    seen: set[str] = set()
    for section in found:
        keys = tuple(key for key in section.keys if key.name not in seen)
        seen |= {key.name for key in keys}
        if keys:
            yield replace(section, keys=keys)


def common() -> tuple[Key, ...]:
    """List the most common keys."""
    known = {key.name: key for section in sections() for key in section.keys}
    return tuple(known[name] for name in COMMON)


def _nested(prefix: str, schema: Schema, defined: Schema) -> Iterator[tuple[str, str]]:
    """Yield the name and the definition of every section below a schema, outer ones first."""
    for name, key in schema["properties"].items():
        for reference in _references(key):
            inner = f"{prefix}{name}.{ENTRY}" if key.get("type") == "array" else f"{prefix}{name}"
            yield inner, reference
            yield from _nested(f"{inner}.", defined[reference], defined)


def _references(key: Schema) -> list[str]:
    """List the definitions that the value of a key, or an entry of its list, may have."""
    alternatives = [key, key.get("items", {}), *key.get("oneOf", ()), *key.get("anyOf", ())]
    return [schema["$ref"].removeprefix("#/$defs/") for schema in alternatives if "$ref" in schema]


def _section(names: list[str], schema: Schema) -> Section:
    prefix = f"{names[0]}." if names[0] else ""
    keys = (
        Key(
            name=f"{prefix}{name}",
            values=_values(key),
            default=_default(key, required=name in schema.get("required", ())),
            description=key.get("description", ""),
        )
        for name, key in schema["properties"].items()
        if key.get("type") == "array" or not _references(key)
    )
    about = schema.get("description", "").split("\n\n")[0].replace("\n", " ")
    return Section(names=tuple(names), description=about, keys=tuple(keys))


def _values(key: Schema) -> str:
    if "anyOf" in key:
        return " | ".join(map(_values, key["anyOf"]))
    if "enum" in key or "const" in key:
        return " | ".join(map(str, key.get("enum", [key.get("const")])))
    kind = str(key["type"])
    if kind == "array":
        return _list(key)
    if kind == "string" and key.get("format") == "path":
        return "path"
    bounds = [f"{sign} {key[bound]:g}" for bound, sign in BOUNDS.items() if bound in key]
    return " ".join([TYPES.get(kind, kind), ", ".join(bounds)]).strip()


def _list(key: Schema) -> str:
    if "prefixItems" in key:
        return "list of " + ", ".join(map(_values, key["prefixItems"]))
    inner = "tables" if _references(key) else str(_values(key["items"]))
    return f"list of {inner}" + (f", at least {key['minItems']}" if "minItems" in key else "")


def _default(key: Schema, *, required: bool) -> str:
    if required:
        return "required"
    value = key.get("default", {})  # the schema omits the defaults of factories, which are empty tables
    if value is None:
        return "none"
    if isinstance(value, str):
        return value or "empty"
    return json.dumps(value) if value not in ([], {}) else "empty"
