"""Objectives by name, a user's own, and the keys that moved to their section."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from learner.objectives.base import COMMON
from learner.objectives.flow_grpo import FlowGRPOSettings
from learner.objectives.registry import (
    check_objective,
    drawn_metrics,
    load_objective,
    metric_names,
    objective_settings,
)
from learner.settings import LearnerSettings
from rollout.retired_keys import with_moved
from rollout.settings import RolloutSettings, explain
from tests.support.paths import ROOT

MOVED = LearnerSettings.moved
OWN = """
from typing import Any, ClassVar, Literal
from pydantic import Field
from learner.objectives.base import Metric, Objective, ObjectiveSettings

class Keys(ObjectiveSettings):
    strength: float = Field(1.0, gt=0)
    kind: Literal["a", "b"] = "a"

class Fine(Objective):
    Settings = Keys
    sampling = frozenset({"cps"})
    metrics: ClassVar = (Metric(name="mine", title="Mine"), Metric(name="quiet"))
    def loss(self, models: Any, part: Any) -> Any: ...

class Plain(Objective):
    def loss(self, models: Any, part: Any) -> Any: ...

class Unfinished(Objective):
    pass

class Shadowing(Fine):
    metrics: ClassVar = (Metric(name="loss"),)

def function() -> None: ...
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module outside the checkout, one that fails, and neither of them afterwards."""
    (tmp_path / "own_objectives.py").write_text(OWN)
    (tmp_path / "broken_objectives.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_objectives", "broken_objectives"):
        sys.modules.pop(name, None)


def section(**values: Any) -> Any:
    return LearnerSettings.model_validate({"objective": values}).objective


def test_the_default_is_flow_grpo() -> None:
    assert LearnerSettings().objective == FlowGRPOSettings()
    assert section(clip=1e-3) == FlowGRPOSettings(clip=1e-3)
    assert type(load_objective(section())).__name__ == "FlowGRPO"


def test_an_objective_of_ones_own_has_its_own_keys() -> None:
    objective = load_objective(section(name="own_objectives:Fine", strength="2.5"))
    assert objective.settings.model_dump() == {
        "name": "own_objectives:Fine", "strength": 2.5, "kind": "a",
    }  # fmt: skip
    assert objective.keeps == {"states", "log_probs"}
    assert not objective.needs_reference
    assert metric_names(objective) == ["mine", "quiet", *(metric.name for metric in COMMON)]


def test_its_section_survives_a_record_and_comes_back() -> None:
    before = LearnerSettings.model_validate({"objective": {"name": "own_objectives:Fine", "strength": 2.5}})
    assert LearnerSettings.model_validate(before.model_dump(mode="json")) == before


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"name": "ppo"}, ["objective.name", "dpo, or module:Class", "'ppo'"]),
        ({"clip": 0}, ["objective.clip", "greater than 0", "got 0"]),
        ({"ratio": "exact"}, ["objective.ratio", "'plain' or 'guard'", "'exact'"]),
        ({"clipp": 1}, ["unknown key objective.clipp"]),
        ({"name": "own_objectives:Fine", "strength": float("nan")}, ["strength", "finite", "nan"]),
    ],
)
def test_a_wrong_section_is_refused_with_key_and_value(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        section(**values)
    message = explain(caught.value)
    assert not [part for part in parts if part not in message], message


def test_what_is_not_a_section_is_refused() -> None:
    with pytest.raises(ValidationError) as caught:
        LearnerSettings.model_validate({"objective": "flow_grpo"})
    assert "objective: expected a section" in explain(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "nowhere:Fine"}, r"objective\.name: got 'nowhere:Fine': cannot import 'nowhere'"),
        ({"name": "broken_objectives:Fine"}, r"cannot import 'broken_objectives': ZeroDivisionError"),
        ({"name": "own_objectives:Finer"}, r"module 'own_objectives' has no 'Finer'"),
        ({"name": "own_objectives:"}, r"'own_objectives:' is not of the form"),
        ({"name": "own_objectives:function"}, r"expected a subclass of .*Objective"),
        ({"name": "own_objectives:Keys"}, r"expected a subclass of .*Objective"),
        ({"name": "own_objectives:Unfinished"}, r"lacks loss of an Objective"),
        ({"name": "own_objectives:Shadowing"}, r"declares a metric of a name that is taken: loss"),
        ({"name": "own_objectives:Fine", "strenght": 1}, r"unknown key learner\.objective\.strenght"),
        (
            {"name": "own_objectives:Fine", "strength": -1, "kind": "c"},
            r"learner\.objective\.strength: .* got -1; learner\.objective\.kind: .*'a' or 'b', got 'c'",
        ),
    ],
)
def test_an_objective_that_cannot_be_loaded_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_objective(section(**values), RolloutSettings(dynamics="cps"))


def test_an_objective_names_the_dynamics_that_it_learns_from() -> None:
    check_objective(section(), RolloutSettings())
    with pytest.raises(ValueError, match=r"rollout\.dynamics: got 'sde', but own_objectives:Fine .* cps"):
        check_objective(section(name="own_objectives:Fine"), RolloutSettings())


def test_guard_needs_the_ratio_of_gaussians() -> None:
    check_objective(section(ratio="guard"), RolloutSettings(dynamics="cps", density="gaussian"))
    with pytest.raises(ValueError, match=r"ratio: guard .* set rollout\.density to gaussian"):
        check_objective(section(ratio="guard"), RolloutSettings(dynamics="cps"))


def test_the_report_draws_what_is_titled() -> None:
    older = {"clip": 1e-4, "ratio": "plain"}
    flow = [
        "ratio_max_deviation", "clip_fraction", "kl", "log_ratio", "grad_norm", "loss", "advantage_rms",
        "pull",
    ]  # fmt: skip
    for learner in ({}, older, {"objective": {"name": "flow_grpo", "clip": 1e-3}}):
        assert [metric.name for metric in drawn_metrics(learner)] == flow
    common = ["grad_norm", "loss", "advantage_rms", "pull"]
    mine = {"objective": {"name": "own_objectives:Fine"}}
    assert [metric.name for metric in drawn_metrics(mine)] == ["mine", *common]
    gone = {"objective": {"name": "own_objectives:Gone"}}
    assert [metric.name for metric in drawn_metrics(gone)] == common


OLD = {"clip": 1e-3, "ratio": "guard", "advantage_clip": 3.0, "beta": 0.04, "kl": "flow_grpo"}


def test_keys_of_older_versions_are_moved() -> None:
    found = LearnerSettings.model_validate({"ranks": 2, **OLD})
    assert found.objective == FlowGRPOSettings.model_validate(OLD)
    assert found == LearnerSettings.model_validate({"ranks": 2, "objective": OLD})
    with pytest.raises(ValidationError) as caught:
        LearnerSettings.model_validate({"clip": 0})
    assert "objective.clip: Input should be greater than 0" in explain(caught.value)


@given(st.sets(st.sampled_from(sorted(MOVED))), st.sets(st.sampled_from(sorted(MOVED))))
def test_where_a_key_stands_twice_the_new_place_wins(old: set[str], new: set[str]) -> None:
    given_section = {**dict.fromkeys(old, "old"), "objective": dict.fromkeys(new, "new")}
    found = with_moved(given_section, MOVED)
    assert not MOVED.keys() & found.keys()
    assert found["objective"] == {**dict.fromkeys(old, "old"), **dict.fromkeys(new, "new")}
    assert with_moved(found, MOVED) == found


@pytest.mark.parametrize("value", [3, None, {"objective": {}}, {}])
def test_what_has_no_moved_key_stays(value: Any) -> None:
    assert with_moved(value, MOVED) is value


def test_settings_are_kept_as_they_are() -> None:
    settings = FlowGRPOSettings(beta=1.0)
    assert objective_settings(settings) is settings


def test_an_objective_may_have_no_keys() -> None:
    assert load_objective(section(name="own_objectives:Plain")).metrics == ()
    with pytest.raises(ValueError, match=r"unknown key learner\.objective\.strength"):
        load_objective(section(name="own_objectives:Plain", strength=1))


def test_objectives_are_light() -> None:
    probe = "import sys, learner.objectives.registry, learner.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=False).returncode == 0
