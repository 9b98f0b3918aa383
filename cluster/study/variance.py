"""The variance design, sampled by noise identity: crossed initial noises, nested SDE paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from cluster.config.errors import UserError
from cluster.config.preflight import check
from cluster.config.settings import RunSettings
from cluster.config.sources import to_toml
from cluster.local.in_process import LocalRewards, load_sampler, load_scorers
from cluster.study.designs import gradients_path, kept_fields, variance_path
from cluster.study.store import finished, write_rows
from learner.score_gradients import ScoreGradients
from rewards.combine import Scores
from rollout.noise import derive_seed
from rollout.prompts import prompt_at
from rollout.records import Noise, Prompt, SampleRequest
from rollout.worker import RolloutWorker

WIDTH: Final = 1024
"""Dimensions of a trajectory's projected gradient."""

Design = Mapping[str, int]
"""The numbers of ``prompts``, ``initial`` noises, ``paths``, and prompts with ``gradients``."""


def variance(
    settings: RunSettings, design: Design, folder: Path, command: str, print_line: Callable[[str], None]
) -> None:
    """Sample and score the design, measure the gradients, and write both, unless they exist already.

    By an ODE every initial noise is sampled twice, with other seeds of a path that it does not have, and
    there are no steps with gradients.

    Raises:
        UserError: if the prompts are too few, or the folder has results of other settings.
    """
    dynamics = settings.rollout.dynamics
    if dynamics == "ode":
        design = {**design, "paths": 2, "gradients": 0}
    rewards_file, config = variance_path(folder, dynamics), _config(settings, design)
    about = {"task": settings.preset, "seed": settings.seed, "design": dict(design), "config": config}
    if finished(rewards_file, about):
        print_line("the design is sampled already")
        return
    prompts = _prompts(settings, design["prompts"])
    worker = load_sampler(settings, kept_fields(settings))
    seed = derive_seed("sketch", settings.seed)
    probe = (
        ScoreGradients(worker.policy, settings.rollout, worker.parameters, WIDTH, seed)
        if design["gradients"]
        else None
    )
    rewards = LocalRewards(settings, load_scorers(settings))
    rows: list[dict[str, Any]] = []
    gradients: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts):
        used = probe if number < design["gradients"] else None
        scored, projected = _one_prompt(settings, worker, rewards, used, prompt, number, design)
        rows += scored
        gradients += projected
        print_line(f"prompt {number + 1}/{len(prompts)}")
    write_rows(gradients_path(folder, dynamics), gradients, {**about, "command": command})
    write_rows(rewards_file, rows, {**about, "command": command})  # last: it marks both as complete


def design_noises(seed: int, prompt: Prompt, initial: int, paths: int) -> list[tuple[int, int, Noise]]:
    """List every (z, e) of a prompt: initial noise z is the same under every prompt, each path is unique."""
    return [
        (
            z,
            e,
            Noise(
                initial=derive_seed("study-initial", seed, z),
                path=derive_seed("study-path", seed, prompt.index, z, e),
            ),
        )
        for z in range(initial)
        for e in range(paths)
    ]


def _one_prompt(
    settings: RunSettings,
    worker: RolloutWorker,
    rewards: LocalRewards,
    probe: ScoreGradients | None,
    prompt: Prompt,
    number: int,
    design: Design,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    cells = design_noises(settings.seed, prompt, design["initial"], design["paths"])
    noises = tuple(noise for _, _, noise in cells)
    request = SampleRequest(group_id=number, prompt=prompt, noises=noises, version=0)
    (chunk,) = worker.sample([request])
    scores = rewards.raw(chunk.images, [prompt] * len(noises), chunk.finite)
    gradients = list(probe.compute(chunk.conditioning, chunk.trajectories)) if probe else []
    places = [{"prompt": number, "initial": z, "path": e} for z, e, _ in cells]
    projected = [{**place, "score": row} for place, row in zip(places, gradients, strict=False)]
    return _reward_rows(prompt, places, noises, scores), projected


def _reward_rows(
    prompt: Prompt, places: Sequence[dict[str, int]], noises: Sequence[Noise], scores: Scores
) -> list[dict[str, Any]]:
    return [
        {
            **place,
            "prompt_index": prompt.index,
            "text": prompt.text,
            "initial_seed": noise.initial,
            "path_seed": noise.path,
            "reward": float(scores.total[i]),
            **{f"reward_{name}": float(values[i]) for name, values in scores.rewards.items()},
        }
        for i, (place, noise) in enumerate(zip(places, noises, strict=True))
    ]


def _prompts(settings: RunSettings, count: int) -> list[Prompt]:
    known = check(settings).train
    if count > len(known):
        raise UserError(
            f"--prompts: {settings.prompts.train} has {len(known)} prompts, and the design needs {count}"
        )
    return [prompt_at(known, settings.seed, position) for position in range(count)]


def _config(settings: RunSettings, design: Design) -> str:
    return f"{to_toml(settings)}\n# design: {dict(design)}"
