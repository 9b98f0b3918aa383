"""The model of a benchmark with sampler and learner, without Ray, and without DeepSpeed if it is missing."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, get_args

import torch
from torch import Tensor, nn

from cluster.config.errors import UserError
from cluster.loop.drawing import oversampled
from learner.objectives.base import Objective
from learner.optimizer import build_optimizer
from learner.rank_shares import RankUpdate, rank_updates
from learner.settings import LearnerSettings
from learner.worker import LearnerWorker
from rollout.families.registry import ModelFolderError, family_of
from rollout.records import Chunk, Keep, Prompt, SampleRequest, group_of
from rollout.settings import Dtype, ModelSettings, RolloutSettings
from rollout.worker import RolloutWorker
from selection.records import Kept

TEXTS: Final = ("a photo of a red circle", "a photo of two crosses", "a green square", "three blue triangles")


@dataclass(frozen=True, slots=True)
class Subject:
    """The subject of a measurement: the settings of model and sampler, and the device."""

    model: ModelSettings
    rollout: RolloutSettings
    device: str


def add_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the common options of sampler, learner and step."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="a pipeline: a folder or a hub name")
    what.add_argument("--random", default="tiny", metavar="NAME", help="real configuration, random weights")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="default: float16 on a GPU")
    parser.add_argument("--size", type=int, help="pixels on a side; default 512, of tiny models fewer")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--lora-rank", type=int, default=32, help="0 trains every parameter")
    parser.add_argument(
        "--batch", type=int, default=defaults.pop("batch", 16), help="images per forward pass"
    )
    parser.add_argument(
        "--groups",
        type=int,
        default=2,
        help="prompts per step, each with a batch of images (sampler: sharing one batch)",
    )
    parser.add_argument("--repeats", type=int, default=5)


def not_compiled(one: Subject) -> Subject:
    """Return the same subject without compilation, which takes long."""
    return replace(one, model=one.model.model_copy(update={"compile": False}))


@contextmanager
def subject(options: argparse.Namespace) -> Iterator[Subject]:
    """Build the subject of some options; a random model is kept in a temporary folder during the block.

    Raises:
        UserError: if the model does not exist.
    """
    gpu = torch.cuda.is_available() and not options.cpu
    dtype = options.dtype or ("float16" if gpu else "float32")
    size = options.size or _size(options)
    with tempfile.TemporaryDirectory() as scratch:
        path = options.model or _random(options.random, Path(scratch), dtype)
        try:
            family_of(path)
        except ModelFolderError as error:
            raise UserError(str(error)) from None
        model = ModelSettings(path=path, dtype=dtype, lora_rank=options.lora_rank, compile=options.compile)
        rollout = RolloutSettings(
            width=size, height=size, steps=options.steps, guidance=options.guidance, batch=options.batch,
            text_tokens=0 if not options.model and options.random == "tiny" else 128,
            threads=options.threads, gpus=int(gpu),
            storage="bfloat16" if dtype == "bfloat16" else "float16",
        )  # fmt: skip
        yield Subject(model, rollout, "cuda" if gpu else "cpu")


def _size(options: argparse.Namespace) -> int:
    from rollout.tools.random_models import TINY_SIZES

    return 512 if options.model else TINY_SIZES.get(options.random, 512)


def _random(name: str, folder: Path, dtype: str) -> str:
    from rollout.tools.random_models import NAMES, save_random

    if name not in NAMES:
        raise UserError(f"--random: got {name!r}, expected one of {', '.join(NAMES)}")
    save_random(name, folder, dtype)
    return str(folder)


def sampler_of(one: Subject, keeps: Collection[Keep] = ("states", "log_probs")) -> RolloutWorker:
    """Load a sampler with the start weights, whose trajectories hold ``keeps``."""
    return RolloutWorker(one.model, one.rollout, seed=0, keeps=keeps)


def requests(one: Subject, groups: int, step: int = 0, share: int = 1) -> list[SampleRequest]:
    """Build the requests of a step: groups, ``share`` of which fill a batch."""
    count = one.rollout.batch // share
    return [
        oversampled(Prompt(index=group, text=TEXTS[group % len(TEXTS)]), group, count, seed=0)
        for group in range(step * groups, (step + 1) * groups)
    ]


def sampled_work(worker: RolloutWorker, asked: Sequence[SampleRequest], updates: int) -> RankUpdate:
    """Sample, and build the only rank's update."""
    return work_of(asked, worker.sample(asked), updates)


def work_of(
    asked: Sequence[SampleRequest],
    chunks: Sequence[Chunk],
    updates: int,
    objective: Objective | None = None,
) -> RankUpdate:
    """Build the only rank's update, with made-up distinct advantages of alternating sign.

    An ``objective`` says what belongs together; by default no two candidates do.
    """
    kept = [
        Kept(group_id=request.group_id, candidate=i, advantage=(-1) ** i * (0.5 + i / len(request.noises)))
        for request in asked
        for i in range(len(request.noises))
    ]
    groups = [group_of(one, [chunk]) for one, chunk in zip(asked, chunks, strict=True)]
    units = objective.units(kept) if objective else None
    (work,) = rank_updates(kept, groups, ranks=1, updates=updates, seed=0, step=0, units=units)
    return work


def learner_of(one: Subject, settings: LearnerSettings, *, plain: bool = False) -> LearnerWorker:
    """Load the service's learner as the only rank; plain autograd runs it if asked, or without DeepSpeed."""
    kind = PlainLearner if plain or not find_spec("deepspeed") else LearnerWorker
    worker = kind(one.model, one.rollout, settings, seed=0, horizon=1000)
    worker.join_alone()
    return worker


class PlainLearner(LearnerWorker):
    """The learner without DeepSpeed: the same objective, finite check and optimizer, in one process."""

    def join(self, rank: int, world: int, address: str, port: int) -> None:
        """Build an engine equivalent to DeepSpeed without ZeRO."""
        self.rank, self.world = rank, world
        if not torch.distributed.is_initialized():
            where = f"tcp://{address}:{port}"
            torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
        self.engine = _Engine(self.policy.transformer, self)
        self.start_averages(0, 1)


class _Engine:
    """The part of a DeepSpeed engine's interface that the learner uses."""

    def __init__(self, transformer: nn.Module, worker: LearnerWorker) -> None:
        self.transformer, self.rate = transformer, worker.settings.learning_rate
        self.basic_optimizer: Any = build_optimizer(worker.parameters, worker.settings)
        self.basic_optimizer.max_norm = worker.settings.max_grad_norm

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.transformer(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.basic_optimizer.step()
        self.basic_optimizer.zero_grad()

    def get_lr(self) -> list[float]:
        return [self.rate]
