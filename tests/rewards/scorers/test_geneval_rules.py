from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.models.detection import Detection
from rewards.scorers.geneval_rules import RELATIONS, apply_rules, check_metadata, relations
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
    line,
    see,
    want,
)  # fmt: skip

CASES: list[tuple[str, list[Detection], Line, bool]] = [
    ("one asked, one found", [CAT], SINGLE, True),
    ("one asked, none found", [], SINGLE, False),
    ("one asked, another class found", [DOG], SINGLE, False),
    ("one asked, two found", [CAT, CAT], SINGLE, True),
    ("other objects are allowed", [CAT, DOG, CAR], SINGLE, True),
    ("sixteen are as good as one", [CAT] * 16, SINGLE, True),
    ("twenty are as good as one", [CAT] * 20, SINGLE, True),
    ("just sure enough", [see("cat", sure=0.301)], SINGLE, True),
    ("the threshold itself is not enough", [see("cat", sure=0.3)], SINGLE, False),
    ("not sure enough", [see("cat", sure=0.1)], SINGLE, False),
    ("the second is sure enough", [see("cat", sure=0.1), see("cat", sure=0.5)], SINGLE, True),
    ("two asked, both found", [CAT, DOG], TWO, True),
    ("two asked, in another order", [DOG, CAT], TWO, True),
    ("two asked, the second missing", [CAT], TWO, False),
    ("two asked, the first missing", [DOG], TWO, False),
    ("two asked, none found", [], TWO, False),
    ("two asked, one twice", [CAT, CAT], TWO, False),
    ("two asked, one unsure", [CAT, see("dog", sure=0.2)], TWO, False),
    ("two asked, a third beside them", [CAT, DOG, CAR], TWO, True),
    ("three counted", [CAT] * 3, COUNT, True),
    ("two instead of three", [CAT] * 2, COUNT, False),
    ("four instead of three", [CAT] * 4, COUNT, False),
    ("many instead of three", [CAT] * 16, COUNT, False),
    ("none instead of three", [], COUNT, False),
    ("three others", [DOG] * 3, COUNT, False),
    ("three and another class", [CAT, CAT, CAT, DOG], COUNT, True),
    ("counting wants to be surer", [CAT, CAT, see("cat", sure=0.85)], COUNT, False),
    ("an unsure fourth does not count", [CAT, CAT, CAT, see("cat", sure=0.85)], COUNT, True),
    ("counting at the threshold", [CAT, CAT, see("cat", sure=0.9)], COUNT, False),
    ("counting over the threshold", [CAT, CAT, see("cat", sure=0.901)], COUNT, True),
    ("counting without exclusion", [CAT] * 4, line("counting", want("cat", 3)), True),
    ("the right colour", [RED], RED_CAT, True),
    ("the wrong colour", [BLUE], RED_CAT, False),
    ("no colour known", [CAT], RED_CAT, False),
    ("the right colour on another class", [BLUE, see("dog", "red")], RED_CAT, False),
    (
        "the surer one has the colour",
        [see("cat", "blue", sure=0.5), see("cat", "red", sure=0.8)],
        RED_CAT,
        True,
    ),
    (
        "the surer one lacks the colour",
        [see("cat", "blue", sure=0.8), see("cat", "red", sure=0.5)],
        RED_CAT,
        False,
    ),
    ("the coloured one is too unsure", [see("cat", "red", sure=0.2)], RED_CAT, False),
    ("two of a colour", [RED, RED], PAIR, True),
    ("one of two has the colour", [RED, BLUE], PAIR, False),
    ("one of a colour, the other missing", [RED], PAIR, False),
    ("both colours right", [RED, see("dog", "blue")], ATTR, True),
    ("colours swapped", [BLUE, see("dog", "red")], ATTR, False),
    ("the first colour wrong", [BLUE, see("dog", "blue")], ATTR, False),
    ("the second colour wrong", [RED, see("dog", "red")], ATTR, False),
    ("one coloured object missing", [RED], ATTR, False),
    ("left of", dog_at(-20, 0), at("left of"), True),
    ("not left of", dog_at(20, 0), at("left of"), False),
    ("right of", dog_at(20, 0), at("right of"), True),
    ("not right of", dog_at(-20, 0), at("right of"), False),
    ("above", dog_at(0, -20), at("above"), True),
    ("not above", dog_at(0, 20), at("above"), False),
    ("below", dog_at(0, 20), at("below"), True),
    ("not below", dog_at(0, -20), at("below"), False),
    ("below is not left of", dog_at(0, 20), at("left of"), False),
    ("diagonal is left of", dog_at(-20, -20), at("left of"), True),
    ("diagonal is above", dog_at(-20, -20), at("above"), True),
    ("diagonal is not right of", dog_at(-20, -20), at("right of"), False),
    ("mostly above is not left of", dog_at(-8, -40), at("left of"), False),
    ("at the same place", dog_at(0, 0), at("left of"), False),
    ("too near to say", dog_at(-2, 0), at("left of"), False),
    ("half of the distance is within the sizes", dog_at(-4, 0), at("left of"), False),
    ("more than half of it is not", dog_at(-4.1, 0), at("left of"), True),
    ("nothing to stand left of", [see("dog", x=-20)], at("left of"), False),
    ("nothing that stands left of it", [CAT], at("left of"), False),
    ("only the surest counts", [CAT, see("dog", x=20), see("dog", x=-20, sure=0.5)], at("left of"), False),
    ("both dogs left of it", [CAT, see("dog", x=-20), see("dog", x=-30)], TWO_DOGS, True),
    ("one of both dogs right of it", [CAT, see("dog", x=-20), see("dog", x=30)], TWO_DOGS, False),
    ("a chain", [CAT, see("dog", x=-20), see("car", x=-20, y=-20)], CHAIN, True),
    ("a chain with a wrong end", [CAT, see("dog", x=-20), see("car", x=-20, y=20)], CHAIN, False),
    ("a chain with a wrong middle", [CAT, see("dog", x=20), see("car", x=20, y=-20)], CHAIN, False),
    ("the excluded is absent", [CAT], NO_CAR, True),
    ("the excluded is there", [CAT, CAR], NO_CAR, False),
    ("the excluded is unsure", [CAT, see("car", sure=0.2)], NO_CAR, True),
    ("a different one is there", [CAT, DOG], NO_CAR, True),
]


def test_the_table_is_large_enough() -> None:
    assert len(CASES) >= 60
    assert len({name for name, *_ in CASES}) == len(CASES)


@pytest.mark.parametrize(("name", "found", "metadata", "strict"), CASES, ids=[case[0] for case in CASES])
def test_strict_is_the_published_accuracy(
    name: str, found: list[Detection], metadata: Line, strict: bool
) -> None:
    check_metadata(metadata, CLASSES, COLORS)
    result = apply_rules(found, metadata, RULES)
    assert result.strict == float(strict)
    assert 0.0 <= result.soft <= 1.0
    assert result.strict == 1.0 or result.soft < 1.0


@pytest.mark.parametrize(
    ("found", "metadata", "soft"),
    [
        ([CAT], SINGLE, 1.0),
        ([CAT, CAT], SINGLE, 0.0),
        ([CAT] * 16, SINGLE, 0.0),
        ([CAT] * 2, COUNT, 2 / 3),
        ([CAT] * 4, COUNT, 2 / 3),
        ([CAT] * 9, COUNT, 0.0),
        ([CAT], TWO, 0.5),
        ([BLUE], RED_CAT, 0.5),
        ([], RED_CAT, 0.0),
        ([RED, see("dog", "red")], ATTR, 0.75),
        (dog_at(20, 0), at("left of"), 2 / 3),
        (dog_at(-20, 0), at("left of"), 1.0),
        ([DOG], at("left of"), 1 / 3),
        ([CAT, CAR], NO_CAR, 0.5),
    ],
)
def test_soft_is_the_mean_of_its_terms(found: list[Detection], metadata: Line, soft: float) -> None:
    assert apply_rules(found, metadata, RULES).soft == pytest.approx(soft)


boxes = st.tuples(*[st.floats(-50, 50)] * 2, *[st.floats(1, 30)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
detections = st.lists(
    st.builds(
        Detection,
        kind=st.sampled_from(CLASSES),
        confidence=st.floats(0, 1),
        box=boxes,
        color=st.sampled_from((*COLORS, None)),
    ),
    max_size=24,
)
kinds = st.sampled_from(CLASSES)
colors = st.sampled_from(COLORS)
numbers = st.integers(1, 4)
pairs = st.permutations(CLASSES).map(lambda order: order[:2])
singles = kinds.map(lambda kind: line("single_object", want(kind)))
twos = pairs.map(lambda pair: line("two_object", want(pair[0]), want(pair[1])))
countings = st.builds(
    lambda kind, n: line("counting", want(kind, n), exclude=(want(kind, n + 1),)), kinds, numbers
)
coloreds = st.builds(lambda kind, color: line("colors", want(kind, color=color)), kinds, colors)
positions = st.builds(
    lambda pair, relation: line("position", want(pair[0]), want(pair[1], position=[relation, 0])),
    pairs,
    st.sampled_from(RELATIONS),
)
attributes = st.builds(
    lambda pair, a, b: line("color_attr", want(pair[0], color=a), want(pair[1], color=b)),
    pairs,
    colors,
    colors,
)
lines = st.one_of(singles, twos, countings, coloreds, positions, attributes)


@given(detections, lines)
def test_soft_stays_in_range_and_one_means_right(found: list[Detection], metadata: Line) -> None:
    result = apply_rules(found, metadata, RULES)
    assert 0.0 <= result.soft <= 1.0
    assert result.strict in (0.0, 1.0)
    assert result.soft < 1.0 or result.strict == 1.0


@given(
    st.permutations(
        [
            see(k, c, x=5.0 * i, sure=0.91 + i / 100)
            for i, (k, c) in enumerate(
                [("cat", "red"), ("dog", "blue"), ("cat", "blue"), ("car", None), ("dog", "red")]
            )
        ]
    ),
    lines,
)
def test_the_order_of_detections_does_not_matter(found: list[Detection], metadata: Line) -> None:
    ordered = sorted(found, key=lambda detection: detection.confidence)
    assert apply_rules(found, metadata, RULES) == apply_rules(ordered, metadata, RULES)


@given(detections, st.one_of(singles, twos))
def test_more_objects_never_make_single_and_two_object_wrong(found: list[Detection], metadata: Line) -> None:
    before = apply_rules(found, metadata, RULES).strict
    after = apply_rules([*found, CAT, DOG, CAR], metadata, RULES).strict
    assert after >= before


@given(st.integers(0, 20), countings)
def test_counting_is_exact(number: int, metadata: Line) -> None:
    item = metadata["include"][0]
    result = apply_rules([see(item["class"])] * number, metadata, RULES)
    assert (result.strict == 1.0) == (number == item["count"]) == (result.soft == 1.0)


@given(detections, coloreds)
def test_colors_follow_the_surest_object(found: list[Detection], metadata: Line) -> None:
    item = metadata["include"][0]
    sure = [d for d in found if d.kind == item["class"] and d.confidence > RULES.threshold]
    best = max(sure, key=lambda d: d.confidence, default=None)
    assert apply_rules(found, metadata, RULES).strict == float(
        best is not None and best.color == item["color"]
    )


@given(detections, attributes)
def test_attribution_is_right_when_both_colors_are(found: list[Detection], metadata: Line) -> None:
    parts = [apply_rules(found, line("colors", item), RULES) for item in metadata["include"]]
    whole = apply_rules(found, metadata, RULES)
    assert whole.strict == min(part.strict for part in parts)
    assert whole.soft == pytest.approx(sum(part.soft for part in parts) / 2)


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@given(boxes, boxes)
def test_relations_are_antisymmetric(a: Any, b: Any) -> None:
    forward = relations(a, b, RULES.position_threshold)
    assert {OPPOSITE[name] for name in forward} == relations(b, a, RULES.position_threshold)
    assert not any(OPPOSITE[name] in forward for name in forward)


@given(boxes, boxes, positions)
def test_position_follows_the_relation(a: Any, b: Any, metadata: Line) -> None:
    target, item = metadata["include"]
    found = [
        Detection(kind=target["class"], confidence=1.0, box=a),
        Detection(kind=item["class"], confidence=1.0, box=b),
    ]
    holds = item["position"][0] in relations(b, a, RULES.position_threshold)
    assert apply_rules(found, metadata, RULES).strict == float(holds)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "include: expected a list of objects, got None"),
        ({"tag": "colors", "include": []}, r"include: expected a list of objects, got \[\]"),
        ({"tag": "poem", "include": [want("cat")]}, "tag: expected one of .*, got 'poem'"),
        (line("colors", want("cow")), r"include\[0\].class: expected one of cat, dog, car, got 'cow'"),
        (line("colors", want("cat", 0)), r"include\[0\].count: expected a whole number .*, got 0"),
        (line("colors", want("cat", color="pink")), r"include\[0\].color: expected one of .*, got 'pink'"),
        (line("position", want("cat", position=["above", 0])), r"position\[1\]: .* earlier .*, got 0"),
        (line("position", want("cat"), want("dog", position=["near", 0])), r"position\[0\]: .*, got 'near'"),
        (line("position", want("cat"), want("dog", position="above")), "position: expected a relation"),
        ({"tag": "colors", "include": ["cat"]}, r"include\[0\]: expected an object with class and count"),
        (line("colors", want("cat"), exclude=(want("cow"),)), r"exclude\[0\].class: .*, got 'cow'"),
        (line("colors", want("cat", 2), exclude=(want("cat", 2),)), r"exclude\[0\].count: .*, got 2"),
        ({**SINGLE, "exclude": None}, "exclude: expected a list of objects, got None"),
        ({**SINGLE, "exclude": 5}, "exclude: expected a list of objects, got 5"),
        ({**SINGLE, "exclude": {"class": "dog", "count": 1}}, "exclude: expected a list of objects, got {"),
        ({**SINGLE, "include": "cat"}, "include: expected a list of objects, got 'cat'"),
        ({**SINGLE, "include": {"class": "cat"}}, "include: expected a list of objects, got {"),
        ({**SINGLE, "exlude": [want("dog")]}, r"metadata: unknown key 'exlude'; did you mean exclude\?"),
        ({"Tag": "colors", "include": [want("cat")]}, r"metadata: unknown key 'Tag'; did you mean tag\?"),
        ({"tag": "colors", "included": [want("cat")]}, r"unknown key 'included'; did you mean include\?"),
        (
            line("colors", want("cat", colour="red")),
            r"include\[0\]: unknown key 'colour'; did you mean color\? \(known keys are class, count, color",
        ),
        (
            line("position", want("cat"), want("dog", pos=["above", 0])),
            r"include\[1\]: unknown key 'pos'; did you mean position\?",
        ),
        (
            line("colors", want("cat", size="big")),
            r"include\[0\]: unknown key 'size' \(known keys are class, count",
        ),
        (
            line("colors", want("cat"), exclude=(want("dog", color="red"),)),
            r"exclude\[0\]: unknown key 'color'.* \(known keys are class, count",
        ),
    ],
)
def test_bad_metadata_is_refused_by_name(metadata: Line, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_metadata(metadata, CLASSES, COLORS)


def test_keys_of_other_rewards_and_the_users_own_are_left_alone() -> None:
    theirs = {"text": "open", "id": 7, "tags": ["a"], "target": "x", "color": "red", "language": None}
    check_metadata({**SINGLE, **theirs}, CLASSES, COLORS)
