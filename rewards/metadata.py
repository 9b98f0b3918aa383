"""Checks of a prompt's metadata: a message names the key, the value and what was expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from reprlib import Repr
from typing import Any, Final, TypeGuard

_FEW: Final = 20
"""Up to how many choices are listed; of more, the nearest are."""
_ALIKE: Final = 0.8
"""How much a stranger's key must look like one of ours to be taken for a slip, as difflib's ratio."""
_SHORT: Final = Repr()
_SHORT.maxstring = 80


def demand(holds: bool, where: str, value: Any, expected: str) -> None:
    """Raise ``ValueError`` naming the place, what was expected and the value, unless the condition holds."""
    if not holds:
        raise ValueError(f"metadata {where}: expected {expected}, got {_SHORT.repr(value)}")


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a JSON array, as text is not."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, as true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_choice(where: str, value: Any, choices: Collection[str]) -> None:
    """Raise ``ValueError`` unless the value is one of the choices."""
    if isinstance(value, str) and value in choices:
        return
    listed = ", ".join(choices)
    if len(choices) > _FEW:
        near = get_close_matches(value.lower(), choices, cutoff=0.5) if isinstance(value, str) else []
        listed = f"{len(choices)} names such as {', '.join(near or list(choices)[:3])}"
    demand(False, where, value, f"one of {listed}")


def check_keys(where: str, item: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ``ValueError`` for a key of an object that is not a known one: nobody would judge by it."""
    for key in item:
        if key not in known:
            near = get_close_matches(key.lower(), known, n=1, cutoff=0.5)
            hint = f", nearest is {near[0]!r}" if near else ""
            raise ValueError(
                f"metadata {where}: unknown key {_SHORT.repr(key)}{hint}; known are {', '.join(known)}"
            )


def check_spelling(metadata: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ``ValueError`` for a key that looks like a known one which the line lacks.

    Any other key may be another reward's, or the user's own.
    """
    lacking = [key for key in known if key not in metadata]
    for key in metadata:
        near = get_close_matches(key.lower(), lacking, n=1, cutoff=_ALIKE)
        if near and key not in known:
            raise ValueError(f"metadata: unknown key {_SHORT.repr(key)}, nearest is {near[0]!r}")
