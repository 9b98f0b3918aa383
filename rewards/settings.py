"""Settings of a reward; light enough for the driver to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from rollout.retired_keys import Retired
from rollout.settings import Settings, finite

Combination = Literal["raw", "standardised"]
"""Sum of the rewards: as they are, or each in units of its spread within the group."""


class RewardSettings(Settings):
    """One reward, its share of the total, and the pool of replicas that computes it."""

    retired: ClassVar[Mapping[str, Retired]] = {
        "max_wait": Retired(default=0, last="0.1.0", why="calls merged by time made runs unrepeatable")
    }

    name: str = Field(
        description="name of the reward, and of its scorer unless that is set: built-in or module:Class"
    )
    scorer: str | None = Field(
        None, description="scorer behind the name, built-in or module:Class; for two rewards of one kind"
    )
    weight: float = Field(1.0, description="share of the total; 0 only watches, below 0 is a penalty")
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the scorer")
    workers: int = Field(1, ge=1, description="replicas of the scorer, each an actor")
    gpus: float = Field(0, ge=0, description="GPUs per replica, or a fraction of one")
    threads: int = Field(1, ge=1, description="CPU threads per replica")
    batch: int = Field(16, ge=1, description="images per call at most; more are split over the replicas")
    deadline: float = Field(120, gt=0, description="seconds a call may take before its replica is replaced")
    attempts: int = Field(3, ge=1, description="calls made for an image before its reward is missing")
    runtime_env: dict[str, Any] = Field(
        default_factory=dict, description="Ray runtime environment of the replicas: pip, env_vars, ..."
    )

    @field_validator("options", "runtime_env")
    @classmethod
    def _finite(cls, values: dict[str, Any]) -> dict[str, Any]:
        return dict(finite(values))

    @property
    def target(self) -> str:
        """The built-in reward or module:Class behind the name."""
        return self.scorer or self.name
