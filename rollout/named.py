"""Import what a user names as ``module:attribute``: an extension of their own."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def imported(name: str) -> Any:
    """Import the attribute that ``module:attribute`` names; the module is on the path or in this folder.

    Raises:
        ValueError: if the name is of another form, its module fails to import or has no such attribute.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} is not of the form module:attribute")
    try:
        found = import_module(module)
    except Exception as error:  # the module is the user's own and may raise anything
        reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot import {module!r}: {reason}") from error
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        raise ValueError(f"module {module!r} has no {attribute!r}") from error
