"""As much of kustomize as the recipes use, so that they can be checked where it is not installed.

Stricter than the original where that one keeps silent: a patch must find its target, a key must be known.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]


def build(folder: Path) -> list[Resource]:
    """The resources of a folder and of those that it builds on, patched."""
    (layer,) = documents(folder / "kustomization.yaml")
    assert layer.keys() <= {"apiVersion", "kind", "resources", "patches"}, layer.keys()
    found: list[Resource] = []
    for entry in layer["resources"]:
        path = (folder / entry).resolve()
        found += build(path) if path.is_dir() else documents(path)
    for patch in layer.get("patches", ()):
        assert patch.keys() <= {"target", "patch", "options"}, patch.keys()
        changed = target(found, patch)
        kind, name = changed["kind"], changed["metadata"]["name"]
        for operation in yaml.safe_load(patch["patch"]):
            apply(changed, operation)
        options = patch.get("options", {})
        assert changed["kind"] == kind or options["allowKindChange"]
        assert changed["metadata"]["name"] == name or options["allowNameChange"]
    return found


def documents(path: Path) -> list[Resource]:
    """The documents of a file, whose anchored parts become copies: a patch of one is none of the others."""
    return [deepcopied(document) for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def deepcopied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: deepcopied(member) for key, member in value.items()}
    return [deepcopied(member) for member in value] if isinstance(value, list) else value


def target(resources: list[Resource], patch: dict[str, Any]) -> Resource:
    wanted = patch["target"]
    assert wanted.keys() == {"kind", "name"}
    matching = [
        r for r in resources if (r["kind"], r["metadata"]["name"]) == (wanted["kind"], wanted["name"])
    ]
    assert len(matching) == 1, f"a patch wants {wanted}, and there are {len(matching)}"
    return matching[0]


def apply(document: Resource, operation: dict[str, Any]) -> None:
    """One operation of JSON patch (RFC 6902)."""
    parent, key = locate(document, operation["path"])
    kind = operation["op"]
    if kind in {"add", "copy"}:
        value = deepcopied(operation["value"]) if kind == "add" else deepcopy(at(document, operation["from"]))
        if isinstance(parent, list):
            parent.insert(len(parent) if key == "-" else int(key), value)
        else:
            parent[key] = value
        return
    at(document, operation["path"])  # must be there
    place = int(key) if isinstance(parent, list) else key
    if kind == "replace":
        parent[place] = deepcopied(operation["value"])
    elif kind == "remove":
        del parent[place]
    else:
        raise ValueError(f"operation {kind!r} is not used here")


def at(document: Any, pointer: str) -> Any:
    parent, key = locate(document, pointer)
    return parent[int(key) if isinstance(parent, list) else key]


def locate(document: Any, pointer: str) -> tuple[Any, str]:
    """The container of what a JSON pointer names, and its key there."""
    *steps, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    for step in steps:
        document = document[int(step) if isinstance(document, list) else step]
    return document, last
