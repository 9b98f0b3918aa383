"""Detections and GenEval lines in a small world of cats, dogs and cars."""

from __future__ import annotations

from typing import Any

from rewards.models.detection import Detection
from rewards.scorers.geneval_rules import Rules

RULES = Rules()
CLASSES = ("cat", "dog", "car")
COLORS = ("red", "blue", "green")
Line = dict[str, Any]


def see(kind: str, color: str | None = None, x: float = 0, y: float = 0, sure: float = 0.95) -> Detection:
    """A detection with a 10 x 10 box around (x, y)."""
    return Detection(kind=kind, confidence=sure, box=(x - 5, y - 5, x + 5, y + 5), color=color)


def want(kind: str, count: int = 1, **extra: Any) -> Line:
    return {"class": kind, "count": count, **extra}


def line(tag: str, *include: Line, exclude: tuple[Line, ...] = ()) -> Line:
    return {"tag": tag, "include": list(include), **({"exclude": list(exclude)} if exclude else {})}


CAT, DOG, CAR = see("cat"), see("dog"), see("car")
SINGLE = line("single_object", want("cat"))
TWO = line("two_object", want("cat"), want("dog"))
COUNT = line("counting", want("cat", 3), exclude=(want("cat", 4),))
RED_CAT = line("colors", want("cat", color="red"))
ATTR = line("color_attr", want("cat", color="red"), want("dog", color="blue"))


def at(relation: str) -> Line:
    """A line that demands the relation of the dog to the cat."""
    return line("position", want("cat"), want("dog", position=[relation, 0]))


def dog_at(x: float, y: float) -> list[Detection]:
    return [see("cat"), see("dog", x=x, y=y)]


RED, BLUE = see("cat", "red"), see("cat", "blue")
PAIR = line("counting", want("cat", 2, color="red"))
NO_CAR = line("single_object", want("cat"), exclude=(want("car"),))
CHAIN = line(
    "position", want("cat"), want("dog", position=["left of", 0]), want("car", position=["above", 1])
)
TWO_DOGS = line("position", want("cat"), want("dog", 2, position=["left of", 0]))
