"""Keys that the configuration no longer has: files and checkpoints that hold their defaults still load."""

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
