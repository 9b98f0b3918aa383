"""The configuration of a run: presets and TOML files, overridden on the command line."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any, Final, NoReturn

import tomli_w
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from cluster.errors import UserError
from learner.settings import LearnerSettings
from rollout.settings import ModelSettings, RolloutSettings, Settings
from selection.settings import SelectionSettings

PRESETS: Final = Path(__file__).parent / "presets"


class PromptSettings(Settings):
    """Prompt files: .jsonl with a "prompt" per line, or .txt."""

    train: Path
    eval: Path


class RewardSettings(Settings):
    """One reward, its share of the total, and the pool of shards that computes it."""

    name: str = Field(description="a built-in reward, or module:Class")
    weight: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the scorer")
    workers: int = Field(1, ge=1, description="reward actors (shards)")
    gpus: float = Field(0, ge=0, description="GPUs per shard")
    deadline: float = Field(120, gt=0, description="seconds a call may take before its shard is replaced")


class ClusterSettings(Settings):
    """Where the actors run."""

    address: str | None = Field(None, description="Ray cluster; default: the job's own, else a local node")
    dashboard_port: int | None = Field(None, ge=1, le=65535, description="serve Ray's dashboard on loopback")
    deadline: float = Field(600, gt=0, description="seconds a sampling call may take")
    object_store_gb: float = Field(1.0, gt=0, description="object store of a local node, in GB")


class RunSettings(Settings):
    """Everything about a run."""

    preset: str = Field("", description="set from the command line's first argument")
    folder: Path | None = Field(None, description="run folder; default runs/PRESET-TIME")
    seed: int = Field(0, ge=0)
    steps: int = Field(100, ge=1, description="training steps")
    groups_per_step: int = Field(8, ge=1, description="prompts per step")
    max_staleness: int = Field(0, ge=0, description="policy versions a group may lag; 0 is on-policy")
    eval_every: int = Field(20, ge=1, description="steps between evaluations")
    eval_samples: int = Field(1, ge=1, description="images per held-out prompt")
    image_every: int = Field(10, ge=1, description="steps between saved margin pairs")
    checkpoint_every: int = Field(20, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept, newest first")
    max_empty_batches: int = Field(5, ge=1, description="steps in a row without a margin before stopping")
    prompts: PromptSettings
    model: ModelSettings
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    selection: SelectionSettings = Field(default_factory=SelectionSettings)
    learner: LearnerSettings = Field(default_factory=LearnerSettings)
    rewards: tuple[RewardSettings, ...] = Field(min_length=1)
    eval_rewards: tuple[RewardSettings, ...] = Field((), description="default: the training rewards")
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)

    @property
    def window(self) -> int:
        """Groups in flight at most; this is the staleness bound."""
        return (self.max_staleness + 1) * self.groups_per_step

    @property
    def judges(self) -> tuple[RewardSettings, ...]:
        """The rewards of an evaluation."""
        return self.eval_rewards or self.rewards

    @model_validator(mode="after")
    def _consistent(self) -> RunSettings:
        if self.groups_per_step % self.learner.ranks:
            raise ValueError(
                f"groups_per_step ({self.groups_per_step}) must be a multiple of "
                f"learner.ranks ({self.learner.ranks})"
            )
        for listed in (self.rewards, self.eval_rewards):
            names = [reward.name for reward in listed]
            if len(set(names)) < len(names):
                raise ValueError(f"every reward may be listed once, got {', '.join(names)}")
        if all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("at least one training reward needs a weight other than 0")
        return self


class _CommandLine(BaseSettings, RunSettings):
    """Only the source of command-line flags; never instantiated."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists every key)")


def preset_names() -> list[str]:
    """The names of the presets that ship."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_toml(source: str) -> dict[str, Any]:
    """The values of a preset or of a TOML file.

    Raises:
        UserError: if there is no such preset or file, or it is not TOML.
    """
    path = Path(source) if source.endswith(".toml") else PRESETS / f"{source}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(preset_names())
        raise UserError(f"no preset or TOML file {source!r}; presets are {known}") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def parse_overrides(arguments: list[str], prog: str) -> dict[str, Any]:
    """Nested values of ``--section.key value`` flags; ``--help`` lists them all.

    Raises:
        UserError: if a flag is unknown or lacks its value.
    """
    parser = _Parser(prog=prog, allow_abbrev=False)
    source: Any = CliSettingsSource(
        _CommandLine, cli_parse_args=arguments, root_parser=parser, cli_parse_none_str="none"
    )
    return dict(source())


def resolve(source: str, overrides: dict[str, Any]) -> RunSettings:
    """Merge a preset or TOML file with overrides and validate the whole.

    Raises:
        UserError: naming every key that is wrong, with its value.
    """
    values = {"preset": Path(source).stem, **read_toml(source)}
    try:
        return RunSettings.model_validate(_merged(values, overrides))
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from None


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], v) for k, v in over.items() if isinstance(v, dict) and k in base}
    return {**base, **over, **both}


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_one(dict(one)) for one in error.errors())


def _explain_one(one: dict[str, Any]) -> str:
    key = ".".join(map(str, one["loc"]))
    message = str(one["msg"]).removeprefix("Value error, ")
    if one["type"] == "extra_forbidden":
        return f"unknown key {key}"
    if one["type"] == "missing":
        return f"{key} is missing"
    shown = "" if isinstance(one["input"], dict) else f", got {one['input']!r}"
    return f"{key}: {message}{shown}" if key else message


def to_toml(settings: RunSettings) -> str:
    """The resolved configuration as TOML that `resolve` reads back."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))
