"""FlowGRPO's own soft score of GenEval's objects, for runs that are compared with its published ones.

Source: the reward server of https://github.com/yifan123/flow_grpo (arXiv 2505.05470). It differs from
`rewards.scorers.geneval_rules.apply_rules` in three ways. Colour and position are looked at only if the
number of objects is exact, not for the surest ones. No term is clamped: a single object that is found 16
times scores -14. A failed position adds a 0 *and* a 1. Exclusions are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.models.detection import Detection
from rewards.scorers.geneval_rules import Rules, counted, relations


def flow_grpo_score(detections: Sequence[Detection], metadata: Mapping[str, Any], rules: Rules) -> float:
    """Compute the mean of the terms, at most 1, of a metadata line that `check_metadata` accepts."""
    objects = counted(detections, metadata.get("tag"), rules)
    matched: list[list[Detection] | None] = []
    terms: list[float] = []
    for item in metadata["include"]:
        found = objects.get(item["class"], [])
        added, holds = _terms(item, found, matched, rules)
        terms += added
        matched.append(found if holds else None)
    return sum(terms) / len(terms)


def _terms(
    item: Mapping[str, Any], found: list[Detection], earlier: Sequence[list[Detection] | None], rules: Rules
) -> tuple[list[float], bool]:
    """Return the terms of an include clause, and whether all of it holds."""
    count = item["count"]
    terms = [1 - abs(count - len(found)) / count]
    if len(found) != count:
        return terms + [0.0] * ("color" in item or "position" in item), False
    holds = True
    if "color" in item:
        right = sum(detection.color == item["color"] for detection in found)
        terms.append(1 - abs(count - right) / count)
        holds = right == count
    if "position" in item and holds:
        relation, index = item["position"]
        target = earlier[index]
        if target is None:
            return [*terms, 0.0], False
        holds = all(
            relation in relations(a.box, b.box, rules.position_threshold) for a in found for b in target
        )
        terms += [1.0] if holds else [0.0, 1.0]
    return terms, holds
