"""Previews of candidates: the clean image predicted at each denoising step, and a few ODE steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.config.preflight import check
from cluster.config.settings import RunSettings
from cluster.config.sources import to_toml
from cluster.local.in_process import LocalRewards, load_sampler, load_scorers
from cluster.loop.production import request_for
from cluster.study.store import finished, write_rows
from rollout.records import Chunk, SampleRequest
from rollout.tensors import unpack
from rollout.worker import RolloutWorker

PREVIEWS: Final = "preview.parquet"
ODE_STEPS: Final = (2, 3)
"""Lengths of the ODE previews beside the one-step preview, which is the prediction at the first step."""


def preview(
    settings: RunSettings, prompts: int, folder: Path, command: str, print_line: Callable[[str], None]
) -> None:
    """Score previews of every candidate of some prompts, and the candidate; write a row per preview.

    Raises:
        UserError: if the folder has results of other settings.
    """
    config = f"{to_toml(settings)}\n# prompts: {prompts}"
    about = {"task": settings.preset, "seed": settings.seed, "config": config, "command": command}
    if finished(folder / PREVIEWS, about):
        print_line("the previews are scored already")
        return
    known = check(settings).train
    worker, rewards = load_sampler(settings), LocalRewards(settings, load_scorers(settings))
    rows: list[dict[str, Any]] = []
    for group in range(prompts):
        rows += _rows(worker, rewards, request_for(settings, known, group, version=0))
        print_line(f"prompt {group + 1}/{prompts}")
    write_rows(folder / PREVIEWS, rows, about)


def _rows(worker: RolloutWorker, rewards: LocalRewards, request: SampleRequest) -> list[dict[str, Any]]:
    (chunk,) = worker.sample([request])
    prompts = [request.prompt] * len(request.noises)
    finals = rewards.raw(chunk.images, prompts, chunk.finite).total
    previews = [*predictions(worker, chunk), *_ode_previews(worker, request)]
    return [
        {"prompt": request.group_id, "candidate": i, "kind": kind, "passes": passes, "sigma": sigma,
         "preview": float(early[i]), "reward": float(finals[i])}
        for kind, passes, sigma, finite, images in previews
        for early in [rewards.raw(images, prompts, finite).total]
        for i in range(len(prompts))
    ]  # fmt: skip


Preview = tuple[str, int, float, Sequence[bool], NDArray[np.uint8]]
"""The kind of a preview, its passes, its noise level, whether each image is finite, and the images."""


def _ode_previews(worker: RolloutWorker, request: SampleRequest) -> list[Preview]:
    """Preview from the initial noise alone, by evaluations of a few steps without the SDE's path."""
    settings = worker.settings
    prompts = [request.prompt] * len(request.noises)
    found: list[Preview] = []
    for steps in ODE_STEPS:
        worker.settings = settings.model_copy(update={"eval_steps": steps})
        found.append(("ode", steps, 1.0, *worker.evaluate(prompts, request.noises)))
    worker.settings = settings
    return found


@torch.no_grad()
def predictions(worker: RolloutWorker, chunk: Chunk) -> list[Preview]:
    """Decode x0 = x - sigma v at every stored step of a group's trajectories.

    The step needs this velocity in any case, so a preview costs only a decode and a score.
    """
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
