"""Estimate a run on GPUs from counted operations and bytes, without loading a model or reserving a GPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.plan.estimate import Batch, Estimate, Hardware, Need, Speed
from cluster.plan.placement import Placement, place
from cluster.plan.reward_costs import reward_memory, seconds_per_image
from cluster.plan.step import sampling_passes
from learner.objectives.base import Objective
from learner.objectives.registry import load_objective
from learner.settings import LearnerSettings
from rollout.families.published import PUBLISHED_SIZES
from rollout.tools.model_costs import Sizes, sizes_of
from rollout.tools.random_models import PUBLISHED, save_configs
from rollout.tools.real_models import TOKENS

OVERHEAD_GB: Final = 1.5
"""Overhead of a process on a GPU: its context, the libraries' workspaces, and the allocator's rounding."""
GATHERED: Final = 1e9
"""Parameters that DeepSpeed keeps whole at once under ZeRO-3, its ``stage3_max_live_parameters``."""
FLOAT32: Final = 0.3
"""Speed of decoding, which is in float32 with convolutions in TF32, as a share of that of other work.

16 images of 512 pixels took 0.33 s on an H100 (BENCHMARKS.md): 120 TFLOP/s of the 396 expected of it.
"""


@dataclass(frozen=True, slots=True)
class _Model:
    """The sizes of a model, known before it is loaded, and the bytes of its text encoders."""

    sizes: Sizes
    encoders: float


def estimate(settings: RunSettings, hardware: Hardware) -> Estimate:
    """Estimate the memory per role and the seconds per step.

    Raises:
        UserError: if the model's configuration is not available or cannot be counted.
    """
    model = _count(settings)
    rollout, learner = settings.rollout, settings.learner
    needs = (
        _need("learner", learner.ranks, learner.gpus, hardware, _learner(settings, model.sizes)),
        _need("rollout", rollout.workers, rollout.gpus, hardware, _sampler(settings, model)),
        *(
            _need(reward.name, reward.workers, reward.gpus, hardware, reward_memory(reward))
            for reward in settings.distinct_rewards.values()
            if reward.gpus
        ),
    )
    placed, speed = place(needs), hardware.speed
    sampling = _sampling(settings, model.sizes, speed) / _busy(placed, "rollout", rollout.workers)
    learning = _learning(settings, model.sizes) / (speed.learning * _busy(placed, "learner", learner.ranks))
    scoring, unknown = _scoring(settings, placed, speed.sampling)
    left_out = ", ".join([*unknown, "weights", "evaluations"])
    return Estimate(
        stages={"sample and score": _together(sampling, scoring, placed), "learn": learning},
        needs=needs,
        # On the same GPUs, sampling ahead while the learner works gains nothing.
        overlaps=settings.max_staleness > 0 and not placed.shared("rollout", "learner"),
        basis=f"{speed.basis}; not counted: {left_out}",
        parts={"sample": sampling, **{f"score by {name}": seconds for name, seconds in scoring.items()}},
        batches=_batches(settings, model.sizes),
    )


def _batches(settings: RunSettings, sizes: Sizes) -> list[Batch]:
    """Return the sampler's and the learner's: at most a step's images and an update's pairs per process."""
    candidates = settings.selection.candidates + settings.selection.drafts
    images = settings.groups_per_step * candidates // settings.rollout.workers
    pairs = share(settings, settings.learner) * _objective(settings.learner).rows(settings.rollout)
    return [
        Batch("rollout.batch", "rollout", settings.rollout.batch, max(images, settings.rollout.batch)),
        Batch("learner.micro_batch", "learner", sizes.pairs, pairs),
    ]


def _together(sampling: float, scoring: Mapping[str, float], placed: Placement) -> float:
    """Combine the seconds of sampling and of scoring, which overlap unless they are on the same GPUs."""
    same = sum(seconds for name, seconds in scoring.items() if placed.shared("rollout", name))
    beside = [seconds for name, seconds in scoring.items() if not placed.shared("rollout", name)]
    return max([sampling + same, *beside])


def _busy(placed: Placement, role: str, count: int) -> int:
    """Count the GPUs, or else the CPU processes, that work for a role at once."""
    return placed.hosts(role) or count


def _sampling(settings: RunSettings, sizes: Sizes, speed: Speed) -> float:
    """Return the seconds of all samplers together."""
    rollout, selection = settings.rollout, settings.selection
    images = settings.groups_per_step * (selection.candidates + selection.drafts)
    passes = sampling_passes(settings) * sizes.sampling.flops / rollout.batch / speed.sampling
    if speed.pixels is not None:
        return passes + images * rollout.width * rollout.height * rollout.frames / speed.pixels
    return passes + images * sizes.decoding.flops / rollout.batch / FLOAT32 / speed.sampling


def _learning(settings: RunSettings, sizes: Sizes) -> float:
    objective = _objective(settings.learner)
    pairs = settings.groups_per_step * settings.selection.keep * objective.rows(settings.rollout)
    prepared = objective.prepared_passes(settings.learner.updates)
    frozen = (objective.needs_reference + prepared) * sizes.reference.flops
    return pairs / sizes.pairs * (sizes.training.flops + frozen)


def _scoring(settings: RunSettings, placed: Placement, flops: float) -> tuple[dict[str, float], list[str]]:
    """Return the seconds of scoring by reward, and the rewards of unknown cost."""
    images = settings.groups_per_step * (settings.selection.candidates + settings.selection.drafts)
    found, unknown = {}, []
    for reward in settings.rewards:
        each = seconds_per_image(reward, settings.rollout, flops)
        if each is None:
            unknown.append(f"the reward {reward.name}")
            continue
        found[reward.name] = images * each / _busy(placed, reward.name, reward.workers)
    return found, unknown


def _objective(learner: LearnerSettings) -> Objective:
    try:
        return load_objective(learner.objective)
    except ValueError as error:
        raise UserError(str(error)) from None


def _need(name: str, count: int, gpus: float, hardware: Hardware, parts: dict[str, float]) -> Need:
    overhead = {"overhead": OVERHEAD_GB * 1e9} if gpus and parts else {}
    return hardware.need(name, count, gpus, parts | overhead)


def _sampler(settings: RunSettings, model: _Model) -> dict[str, float]:
    sizes, rollout = model.sizes, settings.rollout
    return {
        "weights": sizes.weights,
        "encoders": 0.0 if rollout.offload_text or rollout.embeddings else model.encoders,
        "autoencoder": sizes.autoencoder,
        "activations": max(sizes.sampling.live, sizes.decoding.live),
    }


def _learner(settings: RunSettings, sizes: Sizes) -> dict[str, float]:
    learner, model = settings.learner, settings.model
    anchored = _objective(learner).needs_reference
    stage, ranks = learner.zero_stage, learner.ranks
    sharded = {level: 1 / ranks if stage >= level else 1.0 for level in (1, 2, 3)}
    moments = 2 if learner.optimizer == "adamw8bit" else 8
    optimizer = sizes.trained * moments * sharded[1]
    whole = GATHERED * (4 if model.dtype == "float32" else 2) if stage == 3 else 0.0
    live = max(sizes.training.live, anchored * sizes.reference.live)
    return {
        "weights": 0.0 if learner.offload == "parameters" else sizes.weights * sharded[3],
        "gathered": min(whole, sizes.weights),
        "gradients": 4 * sizes.trained * sharded[2],
        "optimizer": 0.0 if learner.offload != "none" else optimizer,
        "average": 4 * sizes.trained * sharded[3] * (1 + _objective(learner).lags),
        "reference": sizes.weights * sharded[3] if anchored and not model.lora_rank else 0.0,
        "activations": live / learner.sequence_parallel,
        "velocities": _velocities(settings, sizes),
    }


def _velocities(settings: RunSettings, sizes: Sizes) -> float:
    """Return the bytes of the behaviour policy's velocities that a rank keeps while a batch is trained."""
    learner = settings.learner
    objective = _objective(learner)
    rows = share(settings, learner) * learner.updates * objective.rows(settings.rollout)
    return 4.0 * sizes.latent * rows * objective.prepared_velocities(learner.updates)


def _count(settings: RunSettings) -> _Model:
    model = settings.model
    with ExitStack() as stack:
        if Path(model.path).is_dir():
            encoders = _on_disk(Path(model.path))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if model.path not in PUBLISHED:
                raise UserError(
                    f"model.path: {model.path} is neither a folder nor one of the published models whose "
                    f"sizes are known: {', '.join(PUBLISHED)}"
                )
            save_configs(PUBLISHED[model.path], folder)
            model = model.model_copy(update={"path": str(folder)})
            encoders = PUBLISHED_SIZES[settings.model.path].text(settings.model)
        try:
            sizes = _sizes(settings, model.path)
        except ValueError as error:
            raise UserError(f"model.path: {error}") from None
    return _Model(sizes, encoders)


def _sizes(settings: RunSettings, path: str) -> Sizes:
    learner, rollout = settings.learner, settings.rollout
    objective = _objective(learner)

    def pairs(tokens: int) -> int:
        return min(objective.whole(learner.pairs(tokens)), share(settings, learner) * objective.rows(rollout))

    return sizes_of(
        settings.model.model_copy(update={"path": path, "lora_path": None}), rollout,
        prompt=_prompt_length(Path(path)), pairs=pairs, checkpointing=learner.gradient_checkpointing,
    )  # fmt: skip


def share(settings: RunSettings, learner: LearnerSettings) -> int:
    """Count the trajectories of a rank in an update."""
    kept = settings.groups_per_step * settings.selection.keep
    return -(-kept // (learner.updates * learner.shares))


def _prompt_length(folder: Path) -> int:
    try:
        config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return TOKENS
    return int(config["model_max_length"])


def _on_disk(folder: Path) -> float:
    files = folder.glob("text_encoder*/*.safetensors")
    return float(sum(file.stat().st_size for file in files))
