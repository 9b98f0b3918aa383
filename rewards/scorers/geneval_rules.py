"""GenEval's rules: detections and a metadata line in, a strict and a soft verdict out.

The rules are pure, so a detector of COCO's classes and the detector of the bundled world share them.
Source: GenEval, https://github.com/djghosh13/geneval (Ghosh et al. 2023, arXiv 2310.11513), whose
published accuracy the strict verdict is; the soft one follows the rewards of FlowGRPO (arXiv
2505.05470) but is clamped to [0, 1], and a failed colour or position is a failure and not three quarters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from rewards.metadata import check_choice, check_keys, check_spelling, demand, is_count, is_list
from rewards.models.detection import Box, Detection
from rewards.scorer import Judgement

RELATIONS: Final = ("left of", "right of", "above", "below")
TAGS: Final = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
KEYS: Final = ("tag", "include", "exclude")
"""The keys of a line that are judged by; others belong to other rewards."""
INCLUDED: Final = ("class", "count", "color", "position")
EXCLUDED: Final = ("class", "count")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """When a detection counts; the defaults are GenEval's own for Mask2Former on COCO.

    ``counting_threshold`` replaces ``threshold`` for the tag "counting". ``position_threshold`` is the
    share of both objects' sizes by which their centres must be apart to stand in a relation.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position_threshold: float = 0.1


@dataclass(frozen=True, slots=True)
class Verdict:
    """``strict`` is 0 or 1, ``soft`` is in [0, 1]; a soft score of 1 implies a strict one of 1.

    The reverse does not hold: strict forgives more objects than asked for (unless excluded), soft does not.
    """

    strict: float
    soft: float


@dataclass(frozen=True, slots=True)
class _Clause:
    """One include clause judged: which detections matched, and what each check said."""

    matched: tuple[Detection, ...] | None
    terms: tuple[float, ...]


def relations(a: Box, b: Box, threshold: float) -> frozenset[str]:
    """The relations in which box ``a`` stands to box ``b``, by GenEval's ``relative_position``.

    The offset of the centres is shortened by ``threshold`` times both sizes; a relation holds when what
    is left along its axis is more than half of the whole distance, so diagonal boxes stand in two.
    """
    first, second = np.asarray(a, float).reshape(2, 2), np.asarray(b, float).reshape(2, 2)
    offset = first.mean(0) - second.mean(0)
    sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    rest = np.maximum(np.abs(offset) - threshold * sizes, 0.0) * np.sign(offset)
    if np.all(np.abs(rest) < 1e-3):
        return frozenset()
    dx, dy = rest / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(name for name, true in holds.items() if true)


def judge(detections: Sequence[Detection], metadata: Mapping[str, Any], rules: Rules) -> Verdict:
    """Judge one image's detections against a metadata line that `check_metadata` accepts.

    Strict is GenEval's accuracy: at least ``count`` objects of every included class; colour and position
    hold for the ``count`` most confident of them; no excluded class reaches its count. Soft is the mean
    over terms: 1 - |found - count| / count, at least 0, for every included class, and 0 or 1 for every
    colour, position and exclusion (an exclusion of an included class is already in its count's term).
    """
    objects = _kept(detections, metadata.get("tag"), rules)
    clauses: list[_Clause] = []
    for item in metadata["include"]:
        clauses.append(_judge_clause(item, objects.get(item["class"], []), clauses, rules))
    excluded = [
        (item["class"], len(objects.get(item["class"], [])) < item["count"])
        for item in metadata.get("exclude", ())
    ]
    included = {item["class"] for item in metadata["include"]}
    terms = [term for clause in clauses for term in clause.terms]
    terms += [float(absent) for kind, absent in excluded if kind not in included]
    strict = all(clause.matched is not None for clause in clauses) and all(absent for _, absent in excluded)
    return Verdict(float(strict), float(np.mean(terms)))


def judgement(verdicts: Sequence[Verdict]) -> Judgement:
    """The verdicts on N images as their scores: the soft one is the value, the strict one a detail."""
    return Judgement(
        values=np.array([verdict.soft for verdict in verdicts], dtype=np.float64),
        valid=np.ones(len(verdicts), dtype=np.bool_),
        details={"strict": np.array([verdict.strict for verdict in verdicts], dtype=np.float64)},
    )


def _kept(detections: Sequence[Detection], tag: str | None, rules: Rules) -> dict[str, list[Detection]]:
    """Detections over the threshold by class, the most confident first, at most ``max_objects`` of each."""
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    kept: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda detection: -detection.confidence):
        group = kept.setdefault(found.kind, [])
        if found.confidence > threshold and len(group) < rules.max_objects:
            group.append(found)
    return kept


def _judge_clause(
    item: Mapping[str, Any], found: list[Detection], earlier: Sequence[_Clause], rules: Rules
) -> _Clause:
    count = item["count"]
    chosen = tuple(found[:count])
    enough = len(chosen) == count
    terms = [max(0.0, 1.0 - abs(len(found) - count) / count)]
    matched = enough
    if "color" in item:
        matched &= all(detection.color == item["color"] for detection in chosen)
        terms.append(float(matched))
    if "position" in item:
        relation, index = item["position"]
        # A wrong colour ends the match in GenEval before the position is looked at, so it fails as well.
        matched &= _all_related(chosen, relation, earlier[index].matched, rules)
        terms.append(float(matched))
    return _Clause(chosen if matched else None, tuple(terms))


def _all_related(
    chosen: Sequence[Detection], relation: str, targets: Sequence[Detection] | None, rules: Rules
) -> bool:
    if targets is None:
        return False
    return all(relation in relations(a.box, b.box, rules.position_threshold) for a in chosen for b in targets)


def check_metadata(metadata: Mapping[str, Any], classes: Collection[str], colors: Collection[str]) -> None:
    """Raise ``ValueError`` naming the offending key or value when ``judge`` could not judge by this metadata.

    Nothing in it is passed over: an object must not hold keys by which nobody judges, and a key of the line
    must not look like one of `KEYS` that is missing.
    """
    check_spelling(metadata, KEYS)
    include, exclude = metadata.get("include"), metadata.get("exclude", ())
    demand(is_list(include) and len(include) > 0, "include", include, "a list of objects")
    check_choice("tag", metadata.get("tag"), TAGS)
    for index, item in enumerate(metadata["include"]):
        _check_included(f"include[{index}]", item, index, classes, colors)
    demand(is_list(exclude), "exclude", exclude, "a list of objects")
    wanted = {item["class"]: item["count"] for item in metadata["include"]}
    for index, item in enumerate(exclude):
        _check_item(f"exclude[{index}]", item, EXCLUDED, classes)
        possible = item["count"] > wanted.get(item["class"], 0)
        demand(possible, f"exclude[{index}].count", item["count"], "more than the included count")


def _check_included(
    where: str, item: Any, index: int, classes: Collection[str], colors: Collection[str]
) -> None:
    _check_item(where, item, INCLUDED, classes)
    if "color" in item:
        check_choice(f"{where}.color", item["color"], colors)
    if "position" in item:
        _check_position(f"{where}.position", item["position"], index)


def _check_item(where: str, item: Any, keys: Sequence[str], classes: Collection[str]) -> None:
    demand(isinstance(item, Mapping), where, item, "an object with class and count")
    check_keys(where, item, keys)
    check_choice(f"{where}.class", item.get("class"), classes)
    count = item.get("count")
    demand(is_count(count) and count >= 1, f"{where}.count", count, "a whole number of at least 1")


def _check_position(where: str, position: Any, index: int) -> None:
    pair = is_list(position) and len(position) == 2
    demand(pair, where, position, "a relation and the index of an earlier include clause")
    relation, target = position
    check_choice(f"{where}[0]", relation, RELATIONS)
    earlier = is_count(target) and 0 <= target < index
    demand(earlier, f"{where}[1]", target, "the index of an earlier include clause")
