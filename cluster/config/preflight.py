"""Check everything that can be wrong with a run before any actor starts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil
from fsspec.core import url_to_fs

from cluster.config.address import check_port, joined
from cluster.config.errors import UserError
from cluster.config.model_check import check_embeddings, check_model
from cluster.config.object_store import check_object_store
from cluster.config.settings import ClusterSettings, RunSettings
from learner.deepspeed_config import deepspeed_config
from learner.objectives.registry import check_objective
from rewards.options import check_options
from rewards.registry import resolve
from rewards.settings import RewardSettings
from rewards.suitability import refusal
from rollout.families.published import PUBLISHED_SIZES
from rollout.families.registry import ModelFolderError, family_of
from rollout.prompts import PromptFileError, load_prompts
from rollout.records import Prompt
from selection.strategies import check_strategy

PROCESS_GB: Final = {
    "ray": 0.9,
    "rollout": 0.75,
    "reward": 0.5,
    "selector": 0.2,
    "observer": 0.2,
    "learner": 0.9,
}
"""Resident memory of each process without its model, as measured on Linux."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The prompts that were read while checking, and remarks for the user."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    remarks: tuple[str, ...] = ()


def check(settings: RunSettings, *, reach: Callable[[ClusterSettings], None] | None = None) -> Inputs:
    """Read and check everything that can be wrong before resources are reserved.

    Before a start, ``reach`` raises a `UserError` if the cluster that the run joins does not answer.

    Raises:
        UserError: naming file, line or key, the value and what was expected.
    """
    try:
        family_of(settings.model.path, settings.model.family)
        inputs = Inputs(load_prompts(settings.prompts.train), load_prompts(settings.prompts.eval))
    except (ModelFolderError, PromptFileError) as error:
        raise UserError(str(error)) from None
    _check_checkpoints(settings)
    try:
        check_objective(settings.learner.objective, settings.rollout)
        check_strategy(settings.selection.strategy, settings.selection.candidates, settings.selection.keep)
        deepspeed_config(settings.learner)
    except ValueError as error:
        raise UserError(str(error)) from None
    for reward in settings.distinct_rewards.values():
        _check_options(reward)
    check_embeddings(settings)
    rewards = {reward.target for reward in settings.distinct_rewards.values()}
    # Once each: both keys may name the same file.
    prompts = {prompt.origin: prompt for prompt in (*inputs.train, *inputs.held_out)}
    for name in sorted(rewards):
        _check_reward(name, prompts.values())
    _check_rounds(settings)
    if not joined(settings.cluster):
        inputs = replace(inputs, remarks=_check_machine(settings))
    elif reach:
        reach(settings.cluster)  # before the model, which takes longer
    remarks = check_model(settings, inputs.train, inputs.held_out)
    return replace(inputs, remarks=(*inputs.remarks, *remarks))


def _check_machine(settings: RunSettings) -> tuple[str, ...]:
    """Check the requirements of a node on this machine, and return remarks for the user."""
    check_port(settings.cluster.dashboard_port)
    remark = check_object_store(settings.cluster.object_store_gb)
    _check_memory(settings)
    return (f"cluster.object_store_gb: {remark}",) if remark else ()


def _check_checkpoints(settings: RunSettings) -> None:
    try:
        url_to_fs(settings.checkpoints or "")
    except (ImportError, ValueError) as error:  # an unknown protocol, or its package is missing
        raise UserError(f"checkpoints: cannot reach {settings.checkpoints}: {error}") from None


def _check_options(reward: RewardSettings) -> None:
    try:
        check_options(reward.name, resolve(reward.target), reward.options)
    except ValueError as error:
        raise UserError(f"rewards: {error}") from None


def _check_reward(name: str, prompts: Collection[Prompt]) -> None:
    try:
        scorer = resolve(name)
    except ValueError as error:
        raise UserError(f"rewards: {error}") from None
    if refused := refusal(name, scorer, prompts):
        raise UserError(refused)


def _check_rounds(settings: RunSettings) -> None:
    whole = [reward.name for reward in settings.rewards if resolve(reward.target).traits.groupwise]
    if settings.selection.adaptive and whole:
        raise UserError(
            f"selection.adaptive: got {settings.selection.adaptive}, but reward {whole[0]} compares all "
            "candidates of a prompt, which are then drawn in two rounds; set it to 0"
        )


def processes(settings: RunSettings) -> dict[str, int]:
    """Count the processes of each kind that a run starts."""
    return {
        "ray": 1,
        "rollout": settings.rollout.workers,
        "reward": sum(reward.workers for reward in settings.distinct_rewards.values()),
        "selector": 1,
        "observer": int(settings.guard.action != "off"),
        "learner": settings.learner.ranks,
    }


def memory_gb(settings: RunSettings) -> float:
    """Estimate the memory of all processes together, in GB."""
    counts = processes(settings)
    size = _model_gb(settings)
    copies = counts["rollout"] + 4 * counts["learner"]  # parameters, gradient, two moments
    base = sum(PROCESS_GB[kind] * count for kind, count in counts.items())
    return base + copies * size + settings.cluster.object_store_gb


def _model_gb(settings: RunSettings) -> float:
    """Return the size of a model's files, or that of a published one by its name."""
    model = settings.model
    if published := PUBLISHED_SIZES.get(model.path):
        return (published.weights(model) + published.text(model)) / 1e9
    return sum(path.stat().st_size for path in Path(model.path).glob("**/*.safetensors")) / 1e9


def _check_memory(settings: RunSettings) -> None:
    needed, free = memory_gb(settings), psutil.virtual_memory().available / 1e9
    if needed > free and settings.rollout.gpus == 0:
        counts = ", ".join(f"{count} {kind}" for kind, count in processes(settings).items())
        raise UserError(
            f"the run needs about {needed:.1f} GB of memory ({counts}), but {free:.1f} GB are free; "
            "lower rollout.workers, learner.ranks or cluster.object_store_gb"
        )
