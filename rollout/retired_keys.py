"""Keys that the configuration no longer has: those with a new name, and those whose default still loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import PydanticCustomError

RETIRED: Final = "retired_key"
"""The type of a validation error about such a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """A removed key: its former ``default``, the ``last`` version that had it, and why it was removed."""

    default: Any
    last: str
    why: str


def with_moved(section: Any, moved: Mapping[str, str]) -> Any:
    """Move keys of an older version to their new (dotted) names; values there are kept."""
    if not isinstance(section, Mapping) or not moved.keys() & section.keys():
        return section
    found = {key: value for key, value in section.items() if key not in moved}
    for old in moved.keys() & section.keys():
        outer, _, inner = moved[old].partition(".")
        if inner:
            found[outer] = {inner: section[old], **found.get(outer, {})}
        else:
            found.setdefault(outer, section[old])
    return found


def without_retired(section: Any, retired: Mapping[str, Retired]) -> Any:
    """Drop the retired keys of a section that hold their former defaults.

    Raises:
        PydanticCustomError: of type `RETIRED`, if one holds another value.
    """
    if not isinstance(section, Mapping):
        return section
    for key, former in retired.items():
        if section.get(key, former.default) != former.default:
            raise PydanticCustomError(RETIRED, "{refusal}", {"refusal": _refusal(section[key], key, former)})
    return {key: value for key, value in section.items() if key not in retired}


def _refusal(value: Any, key: str, former: Retired) -> str:
    return (
        f"{key} = {value!r} is not supported: {key} was removed after version {former.last}, because "
        f"{former.why}; delete the key, which means {former.default!r}, or use version {former.last}"
    )
