"""The built-in rewards by name; importing this module loads no scorer."""

from __future__ import annotations

from typing import Any, Final

from rewards.scorer import Traits
from rollout.named import imported

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
    if ":" not in target:
        raise ValueError(f"unknown reward {name!r}: expected one of {', '.join(REWARDS)}, or module:Class")
    try:
        found = imported(target)
    except ValueError as error:
        raise ValueError(f"reward {name!r}: {error}") from error
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
