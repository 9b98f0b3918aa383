"""The part of a checkpoint that does not depend on ZeRO's partitioning: weights, average and counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from learner.ema import Ema
from learner.engine import to_universal
from learner.records import AVERAGE, WEIGHTS

COUNTS: Final = "learner.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The number of ranks that wrote a checkpoint, their stage of ZeRO, and the optimizer steps before it.

    ``loss_scale`` is the state of a `LossScale`: the bits by which it is lowered, and the steps since. It is
    missing in the oldest checkpoints, where in half precision the trained parameters are rounded.
    """

    world: int
    zero_stage: int
    updates: int
    loss_scale: tuple[int, int] | None = None


def save(folder: Path, ema: Ema, counts: Counts, *, writes: bool) -> None:
    """Write the float32 weights, their average and the counts; every rank calls it, one ``writes``."""
    weights: dict[str, Any] = {}
    average: dict[str, Any] = {}
    for name, parameter in ema.parameters:
        values = ema.masters.assemble(parameter, ema.masters.share(parameter))
        mean = ema.whole(name, parameter)
        if writes:
            weights[name], average[name] = values.cpu().clone(), mean.cpu().clone()
    if writes:
        save_file(weights, str(folder / WEIGHTS))
        save_file(average, str(folder / AVERAGE))
        (folder / COUNTS).write_text(json.dumps(asdict(counts)), encoding="utf-8")


def load(folder: Path, ema: Ema) -> Counts:
    """Read the average into ``ema``, tensor by tensor, and return the counts.

    Raises:
        FileNotFoundError: if the folder has no learner state.
    """
    if not (folder / COUNTS).is_file():
        raise FileNotFoundError(f"{folder}: no learner state to resume from")
    with safe_open(str(folder / AVERAGE), framework="pt") as file:
        for name, parameter in ema.parameters:
            ema.load(name, parameter, file.get_tensor(name))
    return Counts(**json.loads((folder / COUNTS).read_text(encoding="utf-8")))


@contextmanager
def readable(folder: Path, counts: Counts, world: int, *, converts: bool) -> Iterator[tuple[Path, bool]]:
    """Yield a folder that ``world`` ranks can read, and True if it is a universal checkpoint.

    DeepSpeed's own checkpoint can be read by as many ranks as wrote it. For another number, the rank that
    ``converts`` converts it for as long as the context lasts. Every rank calls this.
    """
    if world == counts.world or counts.zero_stage == 0:
        yield folder, False
        return
    target = folder / "universal"
    if converts:
        shutil.rmtree(target, ignore_errors=True)
        to_universal(folder, target)
    dist.barrier()
    yield target, True
    dist.barrier()
    if converts:
        shutil.rmtree(target)
