"""Check of a reward's options against its class, before any of its weights is loaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from rewards.nearest_name import did_you_mean


def check_options(name: str, scorer: type[Any], options: Mapping[str, Any]) -> None:
    """Refuse options that the scorer's constructor does not take, and missing ones that it needs.

    Raises:
        ValueError: naming the option, its value and what was expected.
    """
    parameters, takes_any = _parameters(scorer)
    for option, value in options.items():
        if option in parameters:
            _check_value(name, parameters[option], value)
        elif not takes_any:
            raise ValueError(_unknown(name, option, list(parameters)))
    absent = [
        option
        for option, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and option not in options
    ]
    if absent:
        raise ValueError(f"reward {name!r} needs the option{'s' * (len(absent) > 1)} {', '.join(absent)}")


def _parameters(scorer: type[Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the constructor's named parameters, and whether it accepts others or cannot be inspected."""
    try:
        signature = inspect.signature(scorer, eval_str=True)
    except NameError:  # annotations with names that only type checkers import
        signature = inspect.signature(scorer)
    except (TypeError, ValueError):
        return {}, True
    kinds = inspect.Parameter
    named = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }
    return named, any(p.kind is kinds.VAR_KEYWORD for p in signature.parameters.values())


def _unknown(name: str, option: str, known: list[str]) -> str:
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    return f"reward {name!r} has no option {option!r}{did_you_mean(option, known)} ({takes})"


def _check_value(name: str, parameter: inspect.Parameter, value: Any) -> None:
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return
    try:
        kind: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
        # As JSON, where a list may be a tuple and an integer a float, but text is never a number.
        kind.validate_json(json.dumps(value, default=str), strict=True)
    except PydanticUserError:  # pydantic cannot validate this type
        return
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ValueError(f"reward {name!r}: option {parameter.name}: {reason}, got {value!r}") from None
