"""The steps of an export: check it, write the folder, upload it."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from cluster.config.errors import RunFailed, UserError
from cluster.config.settings import RunSettings
from cluster.config.sources import resolve
from cluster.export.model_card import CARD, Export, model_card
from cluster.record.checkpoints import Checkpoints, checkpoints_of
from cluster.record.run_folder import RunFolder
from cluster.record.stored_checkpoints import DamagedError
from learner.records import AVERAGE, WEIGHTS
from rollout.families.registry import ModelFolderError, family_of


class PushError(RunFailed):
    """The upload of an export to the hub failed."""


def check(options: argparse.Namespace) -> Export:
    """Check everything that can be wrong before the model is loaded.

    Raises:
        UserError: naming the flag or file, its value and what was expected.
    """
    run = RunFolder(options.run)
    if not run.config.is_file():
        raise UserError(f"{run.path} is not a run folder: there is no {run.config}")
    settings = resolve(str(run.config), {})
    if options.what == "lora" and not settings.model.trains_adapter:
        raise UserError(
            "--what lora: the run trained every parameter (model.lora_rank = 0); use --what pipeline"
        )
    step, weights = _checkpoint(run, settings, options.step, options.ema, best=options.best)
    if options.push is not None:
        _check_push(options.push)
    try:
        family_of(settings.model.path)
    except ModelFolderError as error:
        raise UserError(str(error)) from None
    name = f"{options.what}-step-{step}{'-ema' if options.ema else ''}"
    folder = options.to or run.path / "export" / name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to: {folder} is already used; choose a folder that is empty or does not exist")
    return Export(
        run=run, settings=settings, step=step, what=options.what, averaged=options.ema, weights=weights,
        folder=folder, push=options.push,
    )  # fmt: skip


def _checkpoint(
    run: RunFolder, settings: RunSettings, wanted: int | None, averaged: bool, *, best: bool
) -> tuple[int, Path]:
    checkpoints = checkpoints_of(settings, run)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.root} has no committed checkpoint")
    if best:
        wanted = checkpoints.best()
        if wanted is None:
            raise UserError(
                f"--best: {checkpoints.root} has no checkpoint of a step with {settings.best_by or 'best_by'}"
            )
    if wanted is not None and wanted not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(f"--step {wanted}: {checkpoints.root} has no such checkpoint, only {known}")
    try:
        name = AVERAGE if averaged else WEIGHTS
        return _newest_file(checkpoints, steps if wanted is None else [wanted], name)
    except FileNotFoundError as error:
        raise UserError(f"{error}; expected every trained parameter in it, by name") from None


def _newest_file(checkpoints: Checkpoints, steps: Sequence[int], name: str) -> tuple[int, Path]:
    """Return the newest checkpoint's step in which a file is undamaged, and the file."""
    *older, step = steps
    try:
        return step, checkpoints.file(step, name)
    except DamagedError as error:
        if not older:
            raise
        print(f"damaged, so an older checkpoint is used: {error}", file=sys.stderr)
        return _newest_file(checkpoints, older, name)


def _check_push(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {error}") from None
    if "/" not in name:
        raise UserError(f"--push {name}: expected OWNER/NAME")
    if is_offline_mode():
        raise UserError(f"--push {name}: HF_HUB_OFFLINE is set, so nothing can be uploaded")
    if get_token() is None:
        raise UserError(f"--push {name}: no token for the hub; log in with `hf auth login` or set HF_TOKEN")


def write(export: Export) -> None:
    """Write the folder atomically.

    Raises:
        UserError: if the weights do not fit the model, or the folder cannot be written.
    """
    from rollout.tools.export import (
        ExportError,
        absent_components,
        call_arguments,
        write_lora,
        write_pipeline,
    )

    writer = {"lora": write_lora, "pipeline": write_pipeline}[export.what]
    whole = export.folder.absolute()
    draft = whole.with_name(f".{whole.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        writer(export.weights, export.settings.model, export.settings.rollout, draft)
        base = export.settings.model.path
        card = model_card(export, absent_components(base), call_arguments(base, export.settings.rollout))
        (draft / CARD).write_text(card, encoding="utf-8")
        draft.replace(whole)
    except ExportError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{export.folder}: cannot export: {error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def push(folder: Path, name: str) -> str:
    """Upload an export to the model hub, to a private repository if it is new, and return its address.

    Raises:
        PushError: if the hub cannot be reached or refuses the upload; the folder is kept.
    """
    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export from NoiseMargin")
    except (httpx.HTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PushError(f"--push {name}: {reason}; the export is kept in {folder}") from error
    return str(url)
