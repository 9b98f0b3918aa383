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
from cluster.study.store import finished, write_rows
from learner.score_gradients import ScoreGradients
from rewards.combine import Scores
from rollout.noise import derive_seed
from rollout.prompts import prompt_at
from rollout.records import Noise, Prompt, SampleRequest
from rollout.worker import RolloutWorker

REWARDS: Final = "variance.parquet"
GRADIENTS: Final = "gradients.parquet"
WIDTH: Final = 1024
"""Numbers that a trajectory's gradient is projected to."""

Design = Mapping[str, int]
"""How many ``prompts``, ``initial`` noises and ``paths``, and on how many prompts ``gradients`` are taken."""


def variance(
    settings: RunSettings, design: Design, folder: Path, command: str, say: Callable[[str], None]
) -> None:
    """Sample and score the design, take the gradients, and write both; nothing to do where that is done.

    Raises:
        UserError: if the prompts are too few, or the folder holds results of other settings.
    """
    config = _config(settings, design)
    about = {"task": settings.preset, "seed": settings.seed, "design": dict(design), "config": config}
    if finished(folder / REWARDS, about):
        say("the design is sampled already")
        return
    prompts = _prompts(settings, design["prompts"])
    worker = load_sampler(settings)
    seed = derive_seed("sketch", settings.seed)
    probe = ScoreGradients(worker.policy, settings.rollout, worker.parameters, WIDTH, seed)
    judges = LocalRewards(settings, load_scorers(settings))
    rewards: list[dict[str, Any]] = []
    gradients: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts):
        asked = probe if number < design["gradients"] else None
        found, projected = _one_prompt(settings, worker, judges, asked, prompt, number, design)
        rewards += found
        gradients += projected
        say(f"prompt {number + 1}/{len(prompts)}")
    write_rows(folder / GRADIENTS, gradients, {**about, "command": command})
    write_rows(folder / REWARDS, rewards, {**about, "command": command})  # last: it says that all is there


def design_noises(seed: int, prompt: Prompt, initial: int, paths: int) -> list[tuple[int, int, Noise]]:
    """Every (z, e) of a prompt: initial noise z is the same under every prompt, every path is its own."""
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
    judges: LocalRewards,
    probe: ScoreGradients | None,
    prompt: Prompt,
    number: int,
    design: Design,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    cells = design_noises(settings.seed, prompt, design["initial"], design["paths"])
    noises = tuple(noise for _, _, noise in cells)
    request = SampleRequest(group_id=number, prompt=prompt, noises=noises, version=0)
    (chunk,) = worker.sample([request])
    scores = judges.raw(chunk.images, [prompt] * len(noises), chunk.finite)
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
