"""Tests with any JSON metadata: a reward accepts and can score a line, or refuses it with a ValueError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.metadata import check_choice
from rewards.models.detection import Detection
from rewards.registry import REWARDS, resolve
from rewards.scorers.geneval import GenEvalScorer, color_needed
from rewards.scorers.geneval_rules import INCLUDED, KEYS, RELATIONS, TAGS, Rules, apply_rules
from rewards.scorers.ocr import OcrScorer, similarity, target_text
from rewards.suitability import objection
from rollout.records import Prompt

BOX = (0.0, 0.0, 9.0, 9.0)
FOUND = [Detection(kind=kind, confidence=0.95, box=BOX, color="red") for kind in ("cat", "dog", "cat")]
LINE = {
    "prompt": 'a sign that says "cat"',
    "tag": "position",
    "text": "cat",
    "include": [
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "dog", "count": 2, "position": ["above", 0]},
    ],
    "exclude": [{"class": "cat", "count": 3}],
}
words = (
    st.sampled_from(("prompt", "text", "cat", "dog", "red", *KEYS, *INCLUDED, *RELATIONS, *TAGS)) | st.text()
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | words
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4)
)


def slots(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every array and object of a JSON value, with each index or key that it has."""
    if isinstance(node, list | dict):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from slots(node[key])


@st.composite
def lines(draw: st.DrawFn) -> dict[str, Any]:
    """A line with any value at all in one place or two, and sometimes under a key that it did not have."""
    line: dict[str, Any] = deepcopy(LINE)
    for _ in range(draw(st.integers(1, 2))):
        if places := list(slots(line)):
            holder, key = draw(st.sampled_from(places))
            holder[draw(words) if isinstance(holder, dict) and draw(st.booleans()) else key] = draw(values)
    return line


def judgeable(line: dict[str, Any]) -> None:
    """Assert that every reward accepts and can score a line, or refuses it with a message of one line."""
    metadata = {key: value for key, value in line.items() if key != "prompt"}
    prompt = Prompt(index=0, text=str(line["prompt"]), metadata=metadata, origin="p.jsonl:1")
    for name in REWARDS:
        with suppress(ValueError):  # and nothing else, which `objection` would tell as a user's own mistake
            resolve(name).check(prompt)
    said = {name: objection(resolve(name), prompt) for name in REWARDS}
    assert all(
        fault.startswith("p.jsonl:1: ") and len(fault.splitlines()) == 1 for fault in said.values() if fault
    )
    if not objection(GenEvalScorer, prompt):
        assert 0.0 <= apply_rules(FOUND, metadata, Rules()).soft <= 1.0
        assert set(color_needed(FOUND, metadata)) <= {0, 1, 2}
    if not objection(OcrScorer, prompt):
        assert 0.0 <= similarity("cat", target_text(prompt)) <= 1.0


@given(lines())
def test_any_json_is_refused_or_can_be_judged(line: dict[str, Any]) -> None:
    judgeable(line)


@pytest.mark.parametrize("value", [None, 5, -1, 0.5, True, "x", "", [], {}, [None], [[]], {"class": "cat"}])
def test_a_wrong_type_in_any_place_is_refused_or_can_be_judged(value: Any) -> None:
    for number in range(len(list(slots(LINE)))):
        line: dict[str, Any] = deepcopy(LINE)
        holder, key = list(slots(line))[number]
        holder[key] = value
        judgeable(line)


def test_the_line_itself_suits() -> None:
    prompt = Prompt(index=0, text=str(LINE["prompt"]), metadata=json.loads(json.dumps(LINE)))
    assert not objection(GenEvalScorer, prompt)
    assert not objection(OcrScorer, prompt)


def test_a_check_that_stumbles_is_told_with_the_line() -> None:
    class Own:
        @classmethod
        def check(cls, prompt: Prompt) -> None:
            raise KeyError(prompt.metadata["tag"])

    prompt = Prompt(index=4, text="x", metadata={"tag": "cat"}, origin="p.jsonl:5")
    assert objection(Own, prompt) == "p.jsonl:5: KeyError: 'cat'"
    assert objection(Own, replace(prompt, metadata={}, origin="")) == "prompt 4: KeyError: 'tag'"


def test_long_values_and_many_choices_are_shortened() -> None:
    with pytest.raises(ValueError, match="metadata tag: expected one of") as caught:
        check_choice("tag", "x" * 10_000, [f"choice {number}" for number in range(500)])
    assert len(str(caught.value)) < 250
