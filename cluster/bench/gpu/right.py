"""Checks of results, on tiny checkpoints of every family: the device against the CPU, and against itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.bench.gpu.check import Setup, SkippedError
from cluster.bench.subject import Subject, learner_of, requests, sampler_of, work_of
from cluster.bench.table import Measurement
from learner.objectives.base import Objective
from learner.objectives.flow_grpo import FlowGRPOSettings
from learner.objectives.registry import OBJECTIVES, load_objective
from learner.rank_shares import RankUpdate
from learner.settings import LearnerSettings
from learner.worker import LearnerWorker
from rollout.records import Keep, SampleRequest
from rollout.settings import ModelSettings
from rollout.tools.tiny_families import TINY
from rollout.worker import RolloutWorker

LEVELS: Final = 2
"""Largest difference of images of two devices, in steps of 255."""
CLIP: Final = FlowGRPOSettings().clip
"""Largest difference of log-probs of two devices, and of on-policy ratios from 1."""
GRADIENTS: Final = 5e-3
"""Largest distance of two devices' gradients, relative to their length."""
VARIANTS: Final[dict[str, list[dict[str, Any]]]] = {
    "flow_grpo": [{}, {"beta": 0.04}, {"ratio": "guard"}, {"old_log_probs": "learner"}],
    "nft": [{}, {"shared_noise": "none", "behaviour_decay": 0.5, "behaviour_ramp": 1.0, "kl_weight": 0.1}],
}
"""Settings of objectives that take other paths than their defaults."""
FIXED: Final[dict[str, dict[str, Any]]] = {
    "flow_grpo": {"old_log_probs": "sampler"},
    "nft": {"behaviour_decay": 0.5},
    "awm": {"behaviour_decay": 0.5},
}
"""Settings with which an objective's loss is relative to the start, and not to the policy itself."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Images (N, H, W, 3) and log-probs (N, S) of a sampler, and the learner's work on them."""

    images: NDArray[np.int64]
    log_probs: NDArray[Any]
    work: RankUpdate

    @classmethod
    def by(
        cls, worker: RolloutWorker, asked: Sequence[SampleRequest], objective: Objective | None = None
    ) -> Sampled:
        """Sample, and build an update of one optimizer step."""
        chunks = worker.sample(asked)
        images = np.concatenate([chunk.images for chunk in chunks]).astype(np.int64)
        log_probs = np.stack([one.log_probs for chunk in chunks for one in chunk.trajectories])
        return cls(images, log_probs, work_of(asked, chunks, updates=1, objective=objective))


def tiny_subject(setup: Setup, family: str, device: str, dtype: str = "float32", **rollout: Any) -> Subject:
    """Build a family's tiny checkpoint, unless it exists, and its settings on a device."""
    folder, gpus = setup.folder / family, int(device == "cuda")
    if not folder.exists():
        TINY[family].save(folder)
    model = ModelSettings.model_validate({"path": str(folder), "dtype": dtype, "lora_rank": 4})
    return Subject(model, TINY[family].settings(gpus=gpus, **rollout), device)


def plain_learner(one: Subject, **changes: Any) -> LearnerWorker:
    """Load a learner without DeepSpeed, which would keep a process to one kind of device."""
    return learner_of(one, learner_settings(one, **changes), plain=True)


def learner_settings(one: Subject, **changes: Any) -> LearnerSettings:
    """Return a learner whose passes have as many rows as the sampler's, with one update per batch."""
    fixed = {"gpus": one.rollout.gpus, "updates": 1, "micro_batch": one.rollout.batch, "zero_stage": 0}
    return LearnerSettings.model_validate(fixed | changes)


def gradient(learner: LearnerWorker, work: RankUpdate) -> Tensor:
    """Make an update, and return its gradient as it was before clipping, on the CPU."""
    found = [torch.zeros_like(parameter) for _, parameter in learner.parameters]
    hooks = [
        parameter.register_hook(partial(_add, into))
        for (_, parameter), into in zip(learner.parameters, found, strict=True)
    ]
    learner.update(work)
    for hook in hooks:
        hook.remove()
    return torch.cat([one.flatten() for one in found]).cpu()


def _add(into: Tensor, value: Tensor) -> None:
    into += value


def families(setup: Setup) -> Iterator[Measurement]:
    """Compare images, log-probs and gradients of every family with the CPU's, in float32."""
    for number, family in enumerate(TINY):
        # Without a GPU the comparison is of the suite's own making, so half of it will do.
        for dynamics in ("sde", "cps") if setup.gpus else (("sde", "cps")[number % 2],):
            here, there = (
                tiny_subject(setup, family, device, dynamics=dynamics) for device in (setup.device, "cpu")
            )
            yield from _compared(f"{family}, {dynamics}", here, there)


def _compared(name: str, here: Subject, there: Subject) -> Iterator[Measurement]:
    samplers, asked = [sampler_of(one) for one in (here, there)], requests(here, 2)
    ours, reference = (Sampled.by(worker, asked) for worker in samplers)
    odes = [_drawn(worker, here) for worker in samplers]
    # Steps too small to change a weight, so that a learner can be asked twice.
    learners = [plain_learner(one, learning_rate=1e-30) for one in (here, there)]
    deviation = learners[0].update(ours.work).metrics["ratio_max_deviation"]
    slopes = [gradient(learner, reference.work) for learner in learners]
    for label, pair in (("images", (ours.images, reference.images)), ("images by the ODE", odes)):
        apart = float(np.abs(pair[0] - pair[1]).max())
        yield Measurement(f"{name}: {label} (of 255)", [apart], 0, most=LEVELS)
    apart = float(np.abs(ours.log_probs - reference.log_probs).max())
    yield Measurement(f"{name}: log-probs", [apart], 9, most=CLIP)
    yield Measurement(f"{name}: on-policy ratios from 1", [deviation], 9, most=CLIP)
    relative = float((slopes[0] - slopes[1]).norm() / slopes[1].norm())
    yield Measurement(f"{name}: gradients (relative)", [relative], 7, most=GRADIENTS)


def _drawn(worker: RolloutWorker, one: Subject) -> NDArray[np.int64]:
    """Draw a batch of images by the ODE."""
    (asked,) = requests(one, 1)
    return worker.evaluate([asked.prompt] * len(asked.noises), asked.noises)[1].astype(np.int64)


def half_precision(setup: Setup) -> Iterator[Measurement]:
    """Measure the on-policy log-ratios of every family in half precision, per denoising step."""
    half, brain = ("float16", "float16"), ("bfloat16", "bfloat16")
    cases = [(family, *pair) for family in TINY for pair in ((half, brain) if setup.gpus else (brain,))]
    for family, dtype, storage in [*cases, ("sd3", *half), ("sd3", "bfloat16", "float16")]:
        one = tiny_subject(setup, family, setup.device, dtype, storage=storage)
        work = Sampled.by(sampler_of(one), requests(one, 2)).work
        metrics = plain_learner(one).update(work).metrics
        spread = [value for name, value in metrics.items() if name.startswith("log_ratio_rms.t")]
        name = f"{family}, {dtype}, stored in {storage}: spread of log-ratios, largest of all steps"
        yield Measurement(name, [max(spread)], 9, most=CLIP / 2)


def objectives(setup: Setup) -> Iterator[Measurement]:
    """Train on fixed candidates with every objective, whose loss must fall."""
    for name, kind in OBJECTIVES.items():
        for variant in VARIANTS.get(name, [{}]):
            shown = ", ".join([name, *(f"{key} = {value}" for key, value in variant.items())])
            for dynamics in sorted(kind.sampling):
                if dynamics == "cps" and variant.get("ratio") == "guard":
                    continue  # whose ratios need Gaussian densities
                one = tiny_subject(setup, "sd3", setup.device, dynamics=dynamics)
                fallen = _loss_change(one, {"name": name, **variant})
                yield Measurement(f"{shown}, {dynamics}: change of the loss", [fallen], 8, most=-1e-7)


def _loss_change(one: Subject, objective: dict[str, Any], **changes: Any) -> float:
    learner = plain_learner(one, objective=objective, learning_rate=1e-4, **changes)
    fixed = objective | FIXED.get(objective["name"], {})
    judge = load_objective(learner_settings(one, objective=fixed).objective)
    keeps: Collection[Keep] = {*learner.objective.keeps, *judge.keeps}
    work = Sampled.by(sampler_of(one, keeps), requests(one, 2), judge).work
    parts = _prepared(learner, judge, work)
    before = _loss(learner, judge, parts)
    for _ in range(2):
        learner.update(work)
    return _loss(learner, judge, parts) - before


def _prepared(learner: LearnerWorker, objective: Objective, work: RankUpdate) -> Any:
    """Build an objective's mini-batches of some candidates, which know the policy of now as the old one."""
    schedule = learner.policy.schedule(learner.rollout.steps).to(learner.device)
    (share,) = work.shares
    parts = objective.minibatches(
        share, work.trajectories, work.conditionings, schedule=schedule, size=learner.micro_batch
    )
    (prepared,) = objective.prepared(learner.models, [parts])
    return prepared


@torch.no_grad()
def _loss(learner: LearnerWorker, objective: Objective, parts: Any) -> float:
    """Compute an objective's loss of a learner's policy on mini-batches."""
    losses = [(part.weights * objective.loss(learner.models, part).losses).sum() for part in parts]
    return float(torch.stack(losses).sum())


def eight_bits(setup: Setup) -> Iterator[Measurement]:
    """Train on fixed candidates with an optimizer of 8 bits."""
    if not setup.gpus:
        raise SkippedError("for GPUs")
    one = tiny_subject(setup, "sd3", setup.device)
    fallen = _loss_change(one, {"name": "flow_grpo"}, optimizer="adamw8bit")
    yield Measurement("change of the loss", [fallen], 8, most=-1e-7)


def flash_attention(setup: Setup) -> Iterator[Measurement]:
    """Compare images in bfloat16 with flash-attn's attention and with torch's."""
    one = tiny_subject(setup, "flux", setup.device, "bfloat16")
    flash = replace(one, model=one.model.model_copy(update={"attention": "flash"}))
    here, there = (_drawn(sampler_of(which), which) for which in (flash, one))
    yield Measurement("images (of 255), mean", [float(np.abs(here - there).mean())], 3, most=LEVELS)


def export(setup: Setup) -> Iterator[Measurement]:
    """Train, export as an adapter and as a pipeline, load both again, and compare the images."""
    from safetensors.torch import save_file

    from rollout.tools.export import write_lora, write_pipeline

    one = tiny_subject(setup, "sd3", setup.device)
    sampler, learner = sampler_of(one), plain_learner(one, learning_rate=1e-2)
    before = _drawn(sampler, one)
    learner.update(Sampled.by(sampler, requests(one, 2)).work)
    weights = {name: p.detach().cpu().contiguous() for name, p in learner.parameters}
    for name, parameter in sampler.parameters:
        parameter.data.copy_(weights[name])
    trained = _drawn(sampler, one)
    yield Measurement(
        "images changed by training (of 255)", [float(np.abs(trained - before).max())], 0, least=1
    )
    save_file(weights, setup.folder / "trained.safetensors")
    lora, pipeline = setup.folder / "lora", setup.folder / "pipeline"
    write_lora(setup.folder / "trained.safetensors", one.model, one.rollout, lora)
    write_pipeline(setup.folder / "trained.safetensors", one.model, one.rollout, pipeline)
    adapter = {"lora_path": str(lora / "pytorch_lora_weights.safetensors"), "lora_rank": 0}
    for name, changes in (("adapter", adapter), ("pipeline", {"path": str(pipeline), "lora_rank": 0})):
        again = replace(one, model=one.model.model_copy(update=changes))
        apart = np.abs(_drawn(sampler_of(again), again) - trained).max()
        yield Measurement(f"{name}, loaded again: images (of 255)", [float(apart)], 0, most=1)
