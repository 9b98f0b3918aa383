"""Continue a run from its newest checkpoint, if the configuration is unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, Final

from pydantic import ValidationError

from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.config.sources import resolve
from cluster.record.checkpoints import Checkpoints
from cluster.record.events import warn
from cluster.record.marker import Commit, installed
from cluster.record.run_folder import RunFolder
from rollout.retired_keys import RETIRED
from rollout.settings import explain

SAFE: Final = (
    "folder", "preset", "steps", "eval_every", "image_every", "checkpoint_every", "checkpoints",
    "keep_checkpoints", "best_by", "max_empty_batches", "cluster.*", "rollout.*workers", "rollout.gpus",
    "rollout.threads", "learner.ranks", "learner.sequence_parallel", "learner.gpus", "learner.threads",
    "learner.bucket_mb", "learner.max_skipped", "rewards.*.workers", "rewards.*.gpus", "rewards.*.deadline",
    "rewards.*.threads", "rewards.*.attempts", "rewards.*.runtime_env*",
    "eval_rewards.*.workers", "eval_rewards.*.gpus", "eval_rewards.*.deadline", "eval_rewards.*.threads",
    "eval_rewards.*.attempts", "eval_rewards.*.runtime_env*", "guard.*",
    "rewards.*.max_wait", "eval_rewards.*.max_wait",  # in old checkpoints
)  # fmt: skip
"""The keys that may change when a run continues: its length, placement and resources, not its computation."""


def resumable(settings: RunSettings, folder: RunFolder, checkpoints: Checkpoints) -> Commit:
    """Find the newest undamaged checkpoint that fits the configuration, and rewind the run folder to it.

    Raises:
        UserError: without an undamaged checkpoint, or if the configuration has changed.
    """

    def fits(commit: Commit) -> None:
        _check_unchanged(commit.settings, settings)
        if commit.step > settings.steps:
            raise UserError(
                f"--resume: the run has done {commit.step} steps, more than steps = {settings.steps}"
            )

    commit = checkpoints.newest(fits)
    if commit is None:
        raise UserError(f"--resume: {checkpoints.root} has no committed checkpoint")
    checkpoints.rewind(commit, folder)
    return commit


def started_before(settings: RunSettings, folder: RunFolder, checkpoints: Checkpoints) -> Commit | None:
    """Find an earlier attempt's newest checkpoint; without any, prepare the folder for a start from step 0.

    Raises:
        UserError: if every checkpoint is damaged, or the folder is another run's.
    """
    if not folder.config.exists():  # a first attempt, or only the checkpoints at another place remain
        folder.create(settings)
    if checkpoints.steps():
        return resumable(settings, folder, checkpoints)
    _check_unchanged(resolve(str(folder.config), {}).model_dump(mode="json"), settings)
    folder.rewind(-1)
    return None


def report_losses(
    commit: Commit | None, folder: RunFolder, checkpoints: Checkpoints, print_line: Callable[[str], None]
) -> None:
    """Report, by line and event, damaged checkpoints and the consequences of a lost start of the run."""
    checkpoints.report_damage(print_line)
    if commit is None:
        return
    missing = []
    if not folder.start.exists():
        missing.append("eval_win_rate is missing from here on")
    if not any(line["step"] == 0 for line in folder.history()):
        missing.append(f"the drift guard compares with the first values after step {commit.step}")
    if missing:
        warn("start lost", checkpoint=commit.step)
        print_line(f"the run folder's record of step 0 is lost: {', and '.join(missing)}")


def changed_packages(commit: Commit) -> str:
    """List packages, NoiseMargin among them, whose versions differ from the checkpoint's; empty if none do.

    A version known on one side only, such as the commit of a copy without git, is ignored.
    """
    now = installed()
    before = commit.packages.items()
    return ", ".join(f"{name} {was} -> {now[name]}" for name, was in before if now.get(name, was) != was)


def _check_unchanged(before: dict[str, Any], settings: RunSettings) -> None:
    fixed = _fixed(before, settings)
    old, new = dict(_flat(_completed(fixed))), dict(_flat(settings.model_dump(mode="json")))
    changes = [
        f"  {key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _safe(key, settings)
    ]
    if changes:
        raise UserError(
            "--resume: the configuration differs from the run's:\n"
            + "\n".join(changes)
            + "\nrestore these values, or start a new run"
        )


def _fixed(values: Any, settings: RunSettings, place: str = "") -> Any:
    """Omit the keys that may change, where an older version may have had values that are invalid now."""
    if isinstance(values, Mapping):
        named = {key: f"{place}.{key}" if place else key for key in values}
        return {
            key: _fixed(value, settings, named[key])
            for key, value in values.items()
            if not _safe(named[key], settings)
        }
    if isinstance(values, list):
        return [_fixed(value, settings, f"{place}.{number}") for number, value in enumerate(values)]
    return values


def _completed(before: dict[str, Any]) -> dict[str, Any]:
    """Complete an older version's settings with the defaults of newer keys."""
    try:
        return RunSettings.model_validate(before).model_dump(mode="json")
    except ValidationError as error:
        if any(detail["type"] == RETIRED for detail in error.errors()):
            raise UserError(f"--resume: the checkpoint's configuration: {explain(error)}") from None
        return before  # the comparison reports the differences


def _safe(key: str, settings: RunSettings) -> bool:
    if key == "steps":  # other schedules depend on the length of the run
        return settings.learner.schedule == "constant"
    return any(fnmatch(key, pattern) for pattern in SAFE)


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(values, list) and values and isinstance(values[0], Mapping):
        for number, value in enumerate(values):
            yield from _flat(value, f"{prefix}.{number}")
    else:
        yield prefix, values
