"""The configuration of a run: presets and TOML files, overridden on the command line."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import tomli_w
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from cluster.config.errors import UserError
from cluster.config.metric_names import check_rewards
from learner.settings import LearnerSettings
from rewards.settings import Combination, RewardSettings
from rollout.settings import ModelSettings, RolloutSettings, Settings, explain
from rollout.text_files import TextFileError, read_text
from selection.settings import SelectionSettings

PRESETS: Final = Path(__file__).parents[1] / "presets"


class PromptSettings(Settings):
    """Prompt files: .jsonl with a "prompt" per line, or .txt."""

    train: Path
    eval: Path


class ClusterSettings(Settings):
    """Where the actors run."""

    address: str | None = Field(None, description="Ray cluster; default: the job's own, else a local node")
    dashboard_port: int | None = Field(None, ge=1, le=65535, description="serve Ray's dashboard on loopback")
    deadline: float = Field(600, gt=0, description="seconds a sampling call may take")
    learner_deadline: float = Field(
        1800, gt=0, description="seconds an update may take before all learner ranks are started anew"
    )
    object_store_gb: float = Field(
        1.0, ge=0.08, description="object store of a local node, in GB; Ray takes no less than 0.08"
    )
    wait: float = Field(30, ge=1, description="seconds to wait for room in a cluster that was joined")
    nodes: dict[str, str] = Field(
        default_factory=dict,
        description="label noisemargin.io/role of the Ray nodes for rollout, learner, selector or a reward",
    )


class GuardSettings(Settings):
    """What counts as a sign of reward hacking, and what then happens."""

    action: Literal["off", "warn", "pause"] = Field(
        "warn", description="off, warn, or pause: stop after the step with a checkpoint, to be resumed"
    )
    steps: int = Field(5, ge=2, description="first steps that are the start, and latest that are compared")
    change: float = Field(0.3, gt=0, description="relative change from the start that alarms")
    sigmas: float = Field(4, ge=0, description="standard deviations of the first steps it must also exceed")


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
    checkpoints: str | None = Field(None, description="fsspec URL for them; default in the run folder")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept, newest first")
    max_empty_batches: int = Field(5, ge=1, description="steps in a row without a margin before stopping")
    prompts: PromptSettings
    model: ModelSettings
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    selection: SelectionSettings = Field(default_factory=SelectionSettings)
    learner: LearnerSettings = Field(default_factory=LearnerSettings)
    rewards: tuple[RewardSettings, ...] = Field(min_length=1)
    eval_rewards: tuple[RewardSettings, ...] = Field((), description="default: the training rewards")
    combine: Combination = Field(
        "raw", description="add up training rewards as they are, or per-group z-scores"
    )
    guard: GuardSettings = Field(default_factory=GuardSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)

    @property
    def judges(self) -> tuple[RewardSettings, ...]:
        """The rewards of an evaluation."""
        return self.eval_rewards or self.rewards

    @property
    def distinct_rewards(self) -> dict[str, RewardSettings]:
        """Every reward once, by its name, whether it trains, evaluates or both."""
        return {reward.name: reward for reward in (*self.judges, *self.rewards)}

    @property
    def watching(self) -> frozenset[str]:
        """The rewards that only watch: they have a weight neither in training nor in evaluation."""
        listed = (*self.judges, *self.rewards)
        return frozenset(r.name for r in listed) - {r.name for r in listed if r.weight != 0}

    @property
    def optimizer_steps(self) -> int:
        """The length of the run in optimizer steps."""
        return self.steps * self.learner.updates

    @model_validator(mode="after")
    def _consistent(self) -> RunSettings:
        trained = {reward.name: reward for reward in self.rewards}
        for reward in self.eval_rewards:
            same = trained.get(reward.name, reward)
            if (same.target, same.options) != (reward.target, reward.options):
                raise ValueError(
                    f"eval reward {reward.name} differs from the training reward of that name; "
                    f"give it a name of its own, and scorer = '{reward.target}'"
                )
        for listed in (self.rewards, self.eval_rewards):
            names = [reward.name for reward in listed]
            if len(set(names)) < len(names):
                raise ValueError(f"every reward may be listed once, got {', '.join(names)}")
        check_rewards(self.distinct_rewards)
        if all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("at least one training reward needs a weight other than 0")
        if self.eval_rewards and all(reward.weight == 0 for reward in self.eval_rewards):
            raise ValueError(
                "at least one of eval_rewards needs a weight other than 0, since they replace the training "
                "rewards in evaluations; list these as well"
            )
        self._check_previews()
        named = [reward.name for reward in (*self.rewards, *self.eval_rewards)]
        roles = ["rollout", "learner", "selector", "observer", *named]
        if unknown := self.cluster.nodes.keys() - set(roles):
            raise ValueError(f"cluster.nodes: no {', '.join(sorted(unknown))}; there is {', '.join(roles)}")
        return self

    def _check_previews(self) -> None:
        if self.selection.previews and self.rollout.preview_steps >= self.rollout.steps:
            raise ValueError(
                f"rollout.preview_steps must be less than rollout.steps ({self.rollout.steps}) "
                f"where there are selection.previews, got {self.rollout.preview_steps}"
            )


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
        return tomllib.loads(read_text(path))
    except FileNotFoundError:
        known = ", ".join(preset_names())
        raise UserError(f"no preset or TOML file {source!r}; presets are {known}") from None
    except TextFileError as error:
        raise UserError(str(error)) from None
    except (OSError, tomllib.TOMLDecodeError) as error:
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
        raise UserError(f"{source}: {explain(error)}") from None


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(base[k], v) for k, v in over.items() if isinstance(v, dict) and k in base}
    return {**base, **over, **both}


def to_toml(settings: RunSettings) -> str:
    """The resolved configuration as TOML that `resolve` reads back."""
    return tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))
