"""The registry of objectives: the built-in ones by name, and a user's own as ``module:Class``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import ConfigDict, ValidationError, field_validator, model_validator

from learner.objectives.awm import AWM, AWMSettings
from learner.objectives.base import COMMON, Metric, Objective, ObjectiveSettings
from learner.objectives.dpo import DPO, DPOSettings
from learner.objectives.flow_grpo import FlowGRPO, FlowGRPOSettings
from learner.objectives.nft import NFT, NFTSettings
from rollout.named import imported
from rollout.settings import RolloutSettings, explain, finite

OBJECTIVES: Final[Mapping[str, type[Objective]]] = {
    "flow_grpo": FlowGRPO,
    "nft": NFT,
    "awm": AWM,
    "dpo": DPO,
}
DEFAULT: Final = "flow_grpo"


class OwnObjectiveSettings(ObjectiveSettings):
    """The section of an objective named ``module:Class``, whose own ``Settings`` validate the keys later."""

    model_config = ConfigDict(extra="allow")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if ":" not in name:
            raise ValueError(f"expected one of {', '.join(OBJECTIVES)}, or module:Class")
        return name

    @model_validator(mode="after")
    def _finite(self) -> OwnObjectiveSettings:
        finite(self.model_extra or {})
        return self


AnyObjective = FlowGRPOSettings | NFTSettings | AWMSettings | DPOSettings | OwnObjectiveSettings
"""Settings of an objective, with every built-in one listed, so that the command line has its keys."""


def objective_settings(values: Any) -> Any:
    """Validate a section ``learner.objective`` by its ``name``, or as the default if it has no name.

    Raises:
        ValueError: if it is not a section, or naming every key that is wrong.
    """
    if isinstance(values, ObjectiveSettings):
        return values
    if not isinstance(values, Mapping):
        raise ValueError("expected a section with the name of an objective and its keys")
    kind = OBJECTIVES.get(str(values.get("name", DEFAULT)))
    return (kind.Settings if kind else OwnObjectiveSettings).model_validate(values)


def objective_class(name: str) -> type[Objective]:
    """Return the class of an objective, and import a user's own.

    Raises:
        ValueError: naming the key, the value and what was expected, if no such class exists.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    try:
        found = imported(name)
    except ValueError as error:
        raise ValueError(f"learner.objective.name: got {name!r}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, Objective):
        raise ValueError(
            f"learner.objective.name: got {name!r}, expected a subclass of {Objective.__module__}.Objective"
        )
    if lacking := sorted(found.__abstractmethods__):
        raise ValueError(f"learner.objective.name: {name!r} lacks {', '.join(lacking)} of an Objective")
    return found


def load_objective(settings: ObjectiveSettings) -> Objective:
    """Create the objective of a section, whose keys its own ``Settings`` validate.

    Raises:
        ValueError: naming the key, the value and what was expected.
    """
    kind = objective_class(settings.name)
    if isinstance(settings, OwnObjectiveSettings):
        try:
            settings = kind.Settings.model_validate(settings.model_dump())
        except ValidationError as error:
            raise ValueError(explain(error, "learner.objective")) from None
    return kind(settings)


def check_objective(settings: ObjectiveSettings, rollout: RolloutSettings) -> None:
    """Validate that an objective can be loaded and can learn from candidates of these settings.

    Raises:
        ValueError: naming the key, the value and what was expected.
    """
    objective = load_objective(settings)
    objective.check(rollout)
    names = metric_names(objective)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"learner.objective.name: {settings.name} declares a metric of a name that is taken: "
            f"{', '.join(twice)}"
        )


def metric_names(objective: Objective) -> list[str]:
    """List the names of all metrics of an update, except those of single steps."""
    return [metric.name for metric in (*objective.metrics, *COMMON)]


def drawn_metrics(section: Mapping[str, Any]) -> list[Metric]:
    """List the metrics that a report draws of a run with this ``learner`` section, also of an older version.

    If the objective's module cannot be imported, these are the `COMMON` ones alone.
    """
    objective = section.get("objective")
    name = objective.get("name", DEFAULT) if isinstance(objective, Mapping) else DEFAULT
    try:
        own = objective_class(str(name)).metrics
    except ValueError:
        own = ()
    return [metric for metric in (*own, *COMMON) if metric.title]
