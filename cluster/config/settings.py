"""The sections of a run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from cluster.config.metric_names import check_rewards
from learner.settings import LearnerSettings
from rewards.settings import Combination, RewardSettings
from rollout.settings import ModelSettings, RolloutSettings, Settings
from selection.settings import SelectionSettings


class PromptSettings(Settings):
    """Prompt files: .jsonl with a "prompt" per line, or .txt."""

    train: Path = Field(description="prompts to train on")
    eval: Path = Field(description="held-out prompts, drawn with the same noise in every evaluation")


class ClusterSettings(Settings):
    """The Ray cluster of a run, and the nodes of its actors."""

    address: str | None = Field(None, description="Ray cluster; default: the job's own, else a local node")
    dashboard_port: int | None = Field(
        None, ge=1, le=65535, description="port of Ray's dashboard, on loopback; default: no dashboard"
    )
    deadline: float = Field(600, gt=0, description="seconds a sampling call may take")
    learner_deadline: float = Field(
        1800, gt=0, description="seconds an update may take before all learner ranks are restarted"
    )
    object_store_gb: float = Field(
        1.0, ge=0.08, description="object store of a local node, in GB; Ray requires at least 0.08"
    )
    wait: float = Field(30, ge=1, description="seconds to wait for free resources in a joined cluster")
    nodes: dict[str, str] = Field(
        default_factory=dict,
        description="label noisemargin.io/role of the Ray nodes for rollout, learner, selector or a reward",
    )


class GuardSettings(Settings):
    """Signs of reward hacking in the metrics, and the action on them."""

    action: Literal["off", "warn", "pause"] = Field(
        "warn", description="off, warn, or pause: stop after the step with a checkpoint, to be resumed"
    )
    steps: int = Field(
        5, ge=2, description="steps at the start, and as many of the latest, whose means are compared"
    )
    change: float = Field(0.3, gt=0, description="relative change from the start that raises an alarm")
    sigmas: float = Field(
        4, ge=0, description="standard deviations of the first steps that the change must also exceed"
    )


class RunSettings(Settings):
    """Everything about a run."""

    preset: str = Field(
        "", description="name of the preset or TOML file, set from the command line's first argument"
    )
    folder: Path | None = Field(None, description="run folder; default: runs/PRESET-TIME")
    seed: int = Field(
        0, ge=0, description="seed of all noise, shuffles and ties; the same seed gives the same run"
    )
    steps: int = Field(100, ge=1, description="training steps")
    groups_per_step: int = Field(8, ge=1, description="prompts per step")
    max_staleness: int = Field(0, ge=0, description="policy versions a group may lag; 0 is on-policy")
    eval_every: int = Field(20, ge=1, description="steps between evaluations")
    eval_samples: int = Field(1, ge=1, description="images per held-out prompt")
    image_every: int = Field(10, ge=1, description="steps between saved margin pairs")
    checkpoint_every: int = Field(20, ge=1, description="steps between checkpoints")
    checkpoints: str | None = Field(
        None, description="fsspec URL for checkpoints; default: in the run folder"
    )
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept, newest first")
    best_by: str = Field(
        "eval_reward",
        description="held-out metric whose checkpoint with the highest value is kept besides; empty: none",
    )
    max_empty_batches: int = Field(5, ge=1, description="steps in a row without a margin before stopping")
    prompts: PromptSettings
    model: ModelSettings
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    selection: SelectionSettings = Field(default_factory=SelectionSettings)
    learner: LearnerSettings = Field(default_factory=LearnerSettings)
    rewards: tuple[RewardSettings, ...] = Field(
        min_length=1, description="training rewards, added up by weight"
    )
    eval_rewards: tuple[RewardSettings, ...] = Field(
        (), description="rewards of evaluations instead of the training rewards; default: those"
    )
    combine: Combination = Field(
        "raw", description="add up training rewards as they are, or per-group z-scores"
    )
    guard: GuardSettings = Field(default_factory=GuardSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)

    @property
    def eval_rewards_used(self) -> tuple[RewardSettings, ...]:
        """The rewards of an evaluation."""
        return self.eval_rewards or self.rewards

    @property
    def distinct_rewards(self) -> dict[str, RewardSettings]:
        """Every reward once, by its name, whether it trains, evaluates or both."""
        return {reward.name: reward for reward in (*self.eval_rewards_used, *self.rewards)}

    @property
    def watching(self) -> frozenset[str]:
        """The names of the watching rewards, which have weight 0 in training and in evaluation."""
        listed = (*self.eval_rewards_used, *self.rewards)
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
        self._check_drafts()
        if self.combine == "standardised" and self.selection.adaptive:
            raise ValueError(
                "combine: 'standardised' needs all rewards of a prompt at once, but selection.adaptive draws "
                "its candidates in two rounds; use one of them"
            )
        named = [reward.name for reward in (*self.rewards, *self.eval_rewards)]
        roles = ["rollout", "learner", "selector", "observer", *named]
        if unknown := self.cluster.nodes.keys() - set(roles):
            raise ValueError(
                f"cluster.nodes: got {', '.join(sorted(unknown))}, expected some of {', '.join(roles)}"
            )
        return self

    def _check_drafts(self) -> None:
        rollout = self.rollout
        if not self.selection.drafts:
            return
        if rollout.drafted_steps >= rollout.steps:
            raise ValueError(
                f"rollout.draft_steps must be less than rollout.steps ({rollout.steps}) "
                f"with selection.drafts, got {rollout.drafted_steps}"
            )
        if rollout.draft_kind == "path" and rollout.dynamics == "ode" and rollout.solver != "euler":
            raise ValueError(
                f"rollout.draft: got 'path', but {rollout.solver} cannot continue a path; "
                "set rollout.solver to euler, or leave rollout.draft out"
            )
