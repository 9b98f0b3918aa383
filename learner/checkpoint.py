"""The part of a checkpoint that does not depend on ZeRO's partitioning: weights, averages and counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from learner.ema import Average
from learner.engine import Masters, to_universal
from learner.records import WEIGHTS
from rollout.weights import NamedParameters

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


def save(
    folder: Path,
    parameters: NamedParameters,
    masters: Masters,
    averages: Mapping[str, Average],
    counts: Counts,
    *,
    writes: bool,
) -> None:
    """Write the float32 weights, their averages by file and the counts; all ranks call it, one ``writes``."""
    sources: dict[str, Callable[[str, nn.Parameter], Tensor]] = {
        WEIGHTS: masters.whole,
        **{name: average.whole for name, average in averages.items()},
    }
    for file, whole in sources.items():
        values: dict[str, Tensor] = {}
        for name, parameter in parameters:
            found = whole(name, parameter)
            if writes:
                values[name] = found.cpu().clone()
        if writes:
            save_file(values, str(folder / file))
    if writes:
        (folder / COUNTS).write_text(json.dumps(asdict(counts)), encoding="utf-8")


def load(folder: Path, parameters: NamedParameters, averages: Mapping[str, Average]) -> Counts:
    """Read averages by file, tensor by tensor, and return the counts.

    Raises:
        FileNotFoundError: if the folder lacks the learner's state, or one of the averages.
    """
    for name in (COUNTS, *averages):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no learner state to resume from: {name} is missing")
    for name, average in averages.items():
        with safe_open(str(folder / name), framework="pt") as file:
            for key, parameter in parameters:
                average.load(key, parameter, file.get_tensor(key))
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
