"""The built-in rewards by name; importing this module loads no scorer."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from rewards.scorer import Traits

REWARDS: Final[dict[str, str]] = {
    "aesthetic": "rewards.scorers.aesthetic:AestheticScorer",
    "clipscore": "rewards.scorers.clipscore:ClipScoreScorer",
    "geneval": "rewards.scorers.geneval:GenEvalScorer",
    "hpsv2": "rewards.scorers.hpsv2:HpsV2Scorer",
    "jpeg": "rewards.scorers.jpeg:JpegScorer",
    "judge": "rewards.scorers.vlm_judge:JudgeScorer",
    "ocr": "rewards.scorers.ocr:OcrScorer",
    "pickscore": "rewards.scorers.pickscore:PickScoreScorer",
    "remote": "rewards.scorers.remote:RemoteScorer",
    "shapes": "rewards.scorers.shapes:ShapesScorer",
}


def resolve(name: str) -> type[Any]:
    """Import the scorer class behind a name of `REWARDS`, or behind a user's own ``module:Class``.

    Raises:
        ValueError: if the name is unknown, its module or class is missing, or the class is not a scorer.
    """
    target = REWARDS.get(name, name)
    module_name, separator, class_name = target.partition(":")
    if not separator:
        raise ValueError(f"unknown reward {name!r}: expected one of {', '.join(REWARDS)}, or module:Class")
    try:
        found = getattr(import_module(module_name), class_name)
    except ImportError as error:
        raise ValueError(f"reward {name!r}: cannot import {module_name!r}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"reward {name!r}: module {module_name!r} has no {class_name!r}") from error
    return _checked(name, found)


def _checked(name: str, found: Any) -> type[Any]:
    """Return the class if it has a scorer's members; a protocol with data members has no ``issubclass``."""
    if not isinstance(found, type):
        raise ValueError(f"reward {name!r} must be a class, got {found!r}")
    # dir, since getattr would find the metaclass's __call__ on every class.
    lacking = [part for part in ("__call__", "check") if part not in dir(found)]
    if not isinstance(getattr(found, "traits", None), Traits):
        lacking.append("traits")
    if lacking:
        raise ValueError(f"reward {name!r}: {found.__qualname__} lacks {', '.join(lacking)} of a Scorer")
    return found
