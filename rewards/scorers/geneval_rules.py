"""GenEval's rules: detections and a metadata line in, a strict and a soft score out.

The rules are pure, so a detector of COCO's classes and the detector of the bundled world share them.
Source: GenEval, https://github.com/djghosh13/geneval (Ghosh et al. 2023, arXiv 2310.11513), whose
published accuracy is the strict score; the soft score follows the rewards of FlowGRPO (arXiv
2505.05470) but is clamped to [0, 1], and a failed colour or position scores 0, not three quarters.
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
"""The keys of a line that the rules read; others belong to other rewards."""
INCLUDED: Final = ("class", "count", "color", "position")
EXCLUDED: Final = ("class", "count")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Thresholds of the rules; the defaults are GenEval's own for Mask2Former on COCO.

    ``counting_threshold`` replaces ``threshold`` for the tag "counting". ``position_threshold`` is the
    share of both objects' sizes by which their centres must be apart to be in a relation.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position_threshold: float = 0.1


@dataclass(frozen=True, slots=True)
class RuleResult:
    """The scores of one image: ``strict`` is 0 or 1, ``soft`` is in [0, 1]; soft 1 implies strict 1.

    The reverse does not hold: strict forgives more objects than asked for (unless excluded), soft does not.
    """

    strict: float
    soft: float


@dataclass(frozen=True, slots=True)
class _ClauseResult:
    """The result of one include clause: the matching objects, None if it failed, and the soft terms."""

    matched: tuple[Detection, ...] | None
    terms: tuple[float, ...]


def relations(a: Box, b: Box, threshold: float) -> frozenset[str]:
    """Return the relations of box ``a`` to box ``b``, by GenEval's ``relative_position``.

    The offset of the centres is shortened by ``threshold`` times both sizes; a relation holds if the rest
    along its axis is more than half of the whole distance, so diagonal boxes are in two.
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


def apply_rules(detections: Sequence[Detection], metadata: Mapping[str, Any], rules: Rules) -> RuleResult:
    """Apply the rules to one image's detections and a metadata line that `check_metadata` accepts.

    Strict is GenEval's accuracy: at least ``count`` objects of every included class; colour and position
    hold for the ``count`` most confident of them; no excluded class reaches its count. Soft is the mean
    over terms: 1 - |found - count| / count, at least 0, for every included class, and 0 or 1 for every
    colour, position and exclusion (an exclusion of an included class is already in its count's term).
    """
    objects = counted(detections, metadata.get("tag"), rules)
    clauses: list[_ClauseResult] = []
    for item in metadata["include"]:
        clauses.append(_apply_clause(item, objects.get(item["class"], []), clauses, rules))
    excluded = [
        (item["class"], len(objects.get(item["class"], [])) < item["count"])
        for item in metadata.get("exclude", ())
    ]
    included = {item["class"] for item in metadata["include"]}
    terms = [term for clause in clauses for term in clause.terms]
    terms += [float(absent) for kind, absent in excluded if kind not in included]
    strict = all(clause.matched is not None for clause in clauses) and all(absent for _, absent in excluded)
    return RuleResult(float(strict), float(np.mean(terms)))


def to_judgement(results: Sequence[RuleResult]) -> Judgement:
    """Convert the results of N images to a judgement, with soft scores as values and strict as a detail."""
    return Judgement(
        values=np.array([result.soft for result in results], dtype=np.float64),
        valid=np.ones(len(results), dtype=np.bool_),
        details={"strict": np.array([result.strict for result in results], dtype=np.float64)},
    )


def counted(detections: Sequence[Detection], tag: str | None, rules: Rules) -> dict[str, list[Detection]]:
    """Group detections over the threshold by class, most confident first, at most ``max_objects`` of each."""
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    kept: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda detection: -detection.confidence):
        group = kept.setdefault(found.kind, [])
        if found.confidence > threshold and len(group) < rules.max_objects:
            group.append(found)
    return kept


def _apply_clause(
    item: Mapping[str, Any], found: list[Detection], earlier: Sequence[_ClauseResult], rules: Rules
) -> _ClauseResult:
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
        # In GenEval a wrong colour ends the match before the position is checked, so that fails as well.
        matched &= _all_related(chosen, relation, earlier[index].matched, rules)
        terms.append(float(matched))
    return _ClauseResult(chosen if matched else None, tuple(terms))


def _all_related(
    chosen: Sequence[Detection], relation: str, targets: Sequence[Detection] | None, rules: Rules
) -> bool:
    if targets is None:
        return False
    return all(relation in relations(a.box, b.box, rules.position_threshold) for a in chosen for b in targets)


def check_metadata(metadata: Mapping[str, Any], classes: Collection[str], colors: Collection[str]) -> None:
    """Refuse metadata that `apply_rules` cannot use, or would use only in part.

    Objects must not have keys that no rule reads, and a key of the line must not resemble a missing one of
    `KEYS`.

    Raises:
        ValueError: naming the offending key or value.
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
