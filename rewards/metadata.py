"""Checks of a prompt's metadata, whose messages name the key, the value and what was expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from reprlib import Repr
from typing import Any, Final, TypeGuard

from rewards.nearest_name import did_you_mean

_FEW: Final = 20
"""Largest number of choices that a message lists in full; of more, it lists the nearest."""
_ALIKE: Final = 0.8
"""Similarity (difflib's ratio) from which a foreign key counts as a misspelling of one of ours."""
_SHORT: Final = Repr()
_SHORT.maxstring = 80


def demand(holds: bool, where: str, value: Any, expected: str) -> None:
    """Require a condition of a value.

    Raises:
        ValueError: naming the place, the value and what was expected, if the condition is false.
    """
    if not holds:
        raise ValueError(f"metadata {where}: expected {expected}, got {_SHORT.repr(value)}")


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether a value is a JSON array; text is not."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a value is a whole number; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_choice(where: str, value: Any, choices: Collection[str]) -> None:
    """Require that a value is one of the choices.

    Raises:
        ValueError: listing the choices, or the nearest of many, if it is not.
    """
    if isinstance(value, str) and value in choices:
        return
    listed = ", ".join(choices)
    if len(choices) > _FEW:
        near = get_close_matches(value.lower(), choices, cutoff=0.5) if isinstance(value, str) else []
        listed = f"{len(choices)} names such as {', '.join(near or list(choices)[:3])}"
    demand(False, where, value, f"one of {listed}")


def check_keys(where: str, item: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse unknown keys of an object: no rule would read them.

    Raises:
        ValueError: naming the first unknown key and the known ones.
    """
    for key in item:
        if key not in known:
            hint = did_you_mean(key.lower(), known, cutoff=0.5)
            raise ValueError(
                f"metadata {where}: unknown key {_SHORT.repr(key)}{hint} (known keys are {', '.join(known)})"
            )


def check_spelling(metadata: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse keys that resemble a known key which the line lacks.

    Any other key may be another reward's, or the user's own.

    Raises:
        ValueError: naming the key and the known one.
    """
    lacking = [key for key in known if key not in metadata]
    for key in metadata:
        hint = did_you_mean(key.lower(), lacking, cutoff=_ALIKE)
        if hint and key not in known:
            raise ValueError(f"metadata: unknown key {_SHORT.repr(key)}{hint}")
