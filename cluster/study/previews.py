"""Drafts of candidates: the clean image predicted at each denoising step, and short ODEs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.config.preflight import check
from cluster.config.settings import RunSettings
from cluster.config.sources import to_toml
from cluster.local.in_process import LocalRewards, load_sampler, load_scorers
from cluster.loop.production import request_for
from cluster.study.designs import drafts_path, kept_fields
from cluster.study.store import finished, write_rows
from rollout.records import Chunk, SampleRequest
from rollout.tensors import unpack
from rollout.worker import RolloutWorker


def preview(
    settings: RunSettings, prompts: int, folder: Path, command: str, print_line: Callable[[str], None]
) -> None:
    """Score drafts of every candidate of some prompts, and the candidate; write a row per draft.

    Raises:
        UserError: if the folder has results of other settings.
    """
    config = f"{to_toml(settings)}\n# prompts: {prompts}"
    about = {"task": settings.preset, "seed": settings.seed, "config": config, "command": command}
    path = drafts_path(folder, settings.rollout.dynamics)
    if finished(path, about):
        print_line("the drafts are scored already")
        return
    known = check(settings).train
    worker = load_sampler(settings, kept_fields(settings))
    rewards = LocalRewards(settings, load_scorers(settings))
    rows: list[dict[str, Any]] = []
    for group in range(prompts):
        rows += _rows(worker, rewards, request_for(settings, known, group, version=0))
        print_line(f"prompt {group + 1}/{prompts}")
    write_rows(path, rows, about)


def _rows(worker: RolloutWorker, rewards: LocalRewards, request: SampleRequest) -> list[dict[str, Any]]:
    (chunk,) = worker.sample([request])
    prompts = [request.prompt] * len(request.noises)
    finals = rewards.raw(chunk.images, prompts, chunk.finite).total
    kinds: list[DraftKind] = ["path", "ode"] if worker.settings.dynamics == "ode" else ["ode"]
    drafts = [*predictions(worker, chunk), *(one for kind in kinds for one in _drafts(worker, request, kind))]
    return [
        {"prompt": request.group_id, "candidate": i, "kind": kind, "passes": passes, "sigma": sigma,
         "preview": float(early[i]), "reward": float(finals[i])}
        for kind, passes, sigma, finite, images in drafts
        for early in [rewards.raw(images, prompts, finite).total]
        for i in range(len(prompts))
    ]  # fmt: skip


DraftKind = Literal["path", "ode"]
Draft = tuple[str, int, float, Sequence[bool], NDArray[np.uint8]]
"""The kind of a draft, its passes, its noise level, whether each image is finite, and the images."""


def _drafts(worker: RolloutWorker, request: SampleRequest, kind: DraftKind) -> list[Draft]:
    """Draft in every number of steps below a candidate's: by short ODEs, or along the path of one.

    A path is that of Euler's steps, which alone can be continued.
    """
    settings = worker.settings
    sigmas = worker.policy.schedule(settings.steps).sigmas.tolist()
    found: list[Draft] = []
    for steps in range(1, settings.steps):
        worker.settings = settings.model_copy(
            update={
                "draft": kind,
                "draft_steps": steps,
                "solver": "euler" if kind == "path" else settings.solver,
            }
        )
        (chunk,) = worker.begin([request])
        sigma = sigmas[steps - 1] if kind == "path" else 1.0
        found.append((kind, steps, sigma, chunk.finite, chunk.images))
    worker.settings = settings
    return found


@torch.no_grad()
def predictions(worker: RolloutWorker, chunk: Chunk) -> list[Draft]:
    """Decode x0 = x - sigma v at every stored step of a group's trajectories, of which an ODE has none.

    The step needs this velocity in any case, so a draft costs only a decode and a score.
    """
    if not len(chunk.trajectories[0].steps):
        return []
    policy, device = worker.policy, worker.device
    schedule = policy.schedule(worker.settings.steps)
    latents = torch.stack([unpack(one.states) for one in chunk.trajectories]).float().to(device)
    texts = {name: unpack(array).to(device) for name, array in chunk.conditioning.arrays.items()}
    repeated = {name: value.expand(len(latents), *value.shape) for name, value in texts.items()}
    found = []
    for place, step in enumerate(chunk.trajectories[0].steps.tolist()):
        timestep = schedule.timesteps[step].expand(len(latents)).to(device)
        x, sigma = latents[:, place], float(schedule.sigmas[step])
        velocity = policy.velocity(policy.transformer, x, timestep, repeated)
        images, finite = policy.decode(x - sigma * velocity)
        found.append(("path", step + 1, sigma, finite.tolist(), images.numpy()))
    return found
