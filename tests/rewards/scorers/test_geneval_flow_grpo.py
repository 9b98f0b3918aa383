"""FlowGRPO's soft score of GenEval's objects: a table, and a derivation from the published code."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.models.detection import Detection
from rewards.scorers.geneval_flow_grpo import flow_grpo_score
from tests.support.geneval_scenes import (
    ATTR,
    BLUE,
    CAR,
    CAT,
    CHAIN,
    CLASSES,
    COLORS,
    COUNT,
    DOG,
    NO_CAR,
    PAIR,
    RED,
    RED_CAT,
    RULES,
    SINGLE,
    TWO,
    TWO_DOGS,
    Line,
    at,
    dog_at,
    see,
)  # fmt: skip


@pytest.mark.parametrize(
    ("found", "metadata", "score"),
    [
        ([CAT], SINGLE, 1.0),
        ([], SINGLE, 0.0),
        ([CAT] * 2, SINGLE, 0.0),
        ([CAT] * 16, SINGLE, -14.0),
        ([CAT] * 20, SINGLE, -14.0),  # no more than sixteen are looked at
        ([CAT] * 2, COUNT, 2 / 3),
        ([CAT] * 9, COUNT, -1.0),
        ([CAT, DOG, CAR], NO_CAR, 1.0),  # exclusions are ignored
        ([RED], RED_CAT, 1.0),
        ([BLUE], RED_CAT, 0.5),
        ([RED, BLUE], RED_CAT, 0.0),  # one too many: neither is looked at
        ([RED, RED], PAIR, 1.0),
        ([RED, BLUE], PAIR, 0.75),
        ([RED, see("dog", "red")], ATTR, 0.75),
        (dog_at(-20, 0), at("left of"), 1.0),
        (dog_at(20, 0), at("left of"), 0.75),  # a failure adds a 0 and a 1
        ([DOG], at("left of"), 1 / 3),  # no target
        ([CAT, DOG, DOG], at("left of"), 1 / 3),
    ],
)
def test_the_score_is_the_reward_servers(found: list[Detection], metadata: Line, score: float) -> None:
    assert flow_grpo_score(found, metadata, RULES) == pytest.approx(score)


def is_related(a: Detection, b: Detection, relation: str) -> bool:
    """The relation of two 10 x 10 boxes, whose centres must be more than 2 apart along an axis."""
    dx, dy = a.box[0] - b.box[0], a.box[1] - b.box[1]
    whole = math.hypot(dx, dy)
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return along > 2 and (along - 2) / whole > 0.5


def derived(found: list[Detection], metadata: Line) -> float:
    """The score, derived again: every class in turn, its number, its colours, its position."""
    least = 0.9 if metadata["tag"] == "counting" else 0.3
    total, terms, targets = 0.0, 0, {}
    for number, item in enumerate(metadata["include"]):
        mine = [one for one in found if one.kind == item["class"] and one.confidence > least][:16]
        total, terms = total + 1 - abs(item["count"] - len(mine)) / item["count"], terms + 1
        extra = "color" in item or "position" in item
        if len(mine) != item["count"]:
            terms += extra
            continue
        right = len(mine)
        if "color" in item:
            right = len([one for one in mine if one.color == item["color"]])
            total, terms = total + 1 - abs(item["count"] - right) / item["count"], terms + 1
        if right != len(mine):
            continue
        if "position" in item:
            relation, index = item["position"]
            if index not in targets:
                terms += 1
                continue
            related = all(is_related(a, b, relation) for a in mine for b in targets[index])
            total, terms = total + 1, terms + (1 if related else 2)
            if not related:
                continue
        targets[number] = mine
    return total / terms


@given(
    st.lists(
        st.builds(
            see,
            kind=st.sampled_from(CLASSES),
            color=st.sampled_from([*COLORS, None]),
            x=st.sampled_from([-30, -3, 0, 8, 30]),
            y=st.sampled_from([-20, 0, 1, 25]),
            sure=st.just(0.95),
        ),
        max_size=20,
    ),
    st.sampled_from(
        [SINGLE, TWO, COUNT, RED_CAT, ATTR, PAIR, NO_CAR, CHAIN, TWO_DOGS, at("above"), at("right of")]
    ),
)
def test_it_is_the_derivation(found: list[Detection], metadata: Line) -> None:
    assert flow_grpo_score(found, metadata, RULES) == pytest.approx(derived(found, metadata), abs=1e-12)
