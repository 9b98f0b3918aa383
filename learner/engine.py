"""The DeepSpeed engine of one rank; the only file that imports deepspeed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from learner.deepspeed_config import deepspeed_config
from learner.optimizer import LearningRateSchedule, build_optimizer
from learner.settings import LearnerSettings
from rollout.weights import NamedParameters

COLLECTIVE_TIMEOUT: Final = timedelta(hours=6)
"""Long, since the driver detects a hang by its own deadline, and knows which rank raised an error instead."""
TAG: Final = "engine"


def join(rank: int, world: int, address: str, port: int, *, gpu: bool) -> None:
    """Join the process group of all ranks, with NCCL on GPUs or gloo on CPUs, and without a launcher."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK="0",
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cuda" if gpu else "cpu",
    )
    if not gpu and address == "127.0.0.1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import deepspeed

    # On a CPU this op is compiled at first use (40 s and a C++ compiler), and only inference needs it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT
    )


def build_engine(
    transformer: Any, parameters: NamedParameters, settings: LearnerSettings, horizon: int
) -> Any:
    """Wrap the transformer in an engine; ``horizon`` is the run's length in optimizer steps."""
    import deepspeed

    optimizer = build_optimizer(parameters, settings)
    schedule = LearningRateSchedule(settings.schedule, settings.warmup, horizon)
    engine, *_ = deepspeed.initialize(
        model=transformer,
        model_parameters=[p for _, p in parameters],
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
        config=deepspeed_config(settings),
    )
    return engine


def partition(module: nn.Module, settings: LearnerSettings, device: str) -> None:
    """Divide a module among the ranks under ZeRO-3, so that a GPU never holds the whole; collective.

    Parameters are taken one by one from where they were loaded; the engine would first move all of them.
    """
    import deepspeed

    deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config(settings))
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def build_frozen(transformer: Any, settings: LearnerSettings) -> Any:
    """Wrap a frozen model under ZeRO-3, for a reference policy that is too large to be whole on a rank."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=transformer, config=deepspeed_config(settings))
    return engine


def grad_norm(engine: Any) -> float:
    """Return the norm of the last update's gradient, before clipping."""
    own = getattr(engine.basic_optimizer, "norm", None)
    return float(engine.get_global_grad_norm() if own is None else own)


@contextmanager
def whole(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gather parameters that ZeRO-3 has partitioned while the context lasts; a collective operation."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


@contextmanager
def replaced(
    parameters: NamedParameters, masters: Masters, whole_of: Callable[[str, nn.Parameter], Tensor]
) -> Iterator[None]:
    """Replace the values of parameters while the context lasts, which optimizes nothing; collective.

    ``whole_of`` returns the other values of a whole parameter, float32.
    """
    if any(hasattr(p, "ds_id") for _, p in parameters):
        _overwrite(parameters, whole_of)
        try:
            yield
        finally:
            _overwrite(parameters, masters.whole)
        return
    own = [p.data for _, p in parameters]
    for name, p in parameters:
        p.data = whole_of(name, p)
    try:
        yield
    finally:
        for (_, p), values in zip(parameters, own, strict=True):
            p.data = values


def _overwrite(parameters: NamedParameters, whole_of: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Write values into parameters that ZeRO-3 has partitioned, one at a time."""
    import deepspeed

    for name, p in parameters:
        values = whole_of(name, p)
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
            p.data.copy_(values)


class Masters:
    """The values of trained parameters, float32, under any stage of ZeRO.

    Each rank has its own share: all values of a parameter, or under ZeRO-3 an equal part of them, padded.
    """

    def __init__(self, rank: int, world: int) -> None:
        """Set this rank and the number of ranks, by which parameters are divided."""
        self.rank, self.world = rank, world

    def share(self, parameter: Any) -> Tensor:
        """Return this rank's share, float32; a collective operation."""
        if not hasattr(parameter, "ds_id"):
            return cast(Tensor, parameter.detach())
        from deepspeed.utils import safe_get_local_fp32_param

        found: Tensor = safe_get_local_fp32_param(parameter)
        return found.flatten()

    def assemble(self, parameter: Any, share: Tensor) -> Tensor:
        """Assemble a whole parameter from every rank's share, on every rank; a collective operation."""
        if not hasattr(parameter, "ds_id"):
            return share
        parts = [torch.empty_like(share) for _ in range(self.world)]
        torch.distributed.all_gather(parts, share)
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)

    def whole(self, name: str, parameter: Any) -> Tensor:
        """Assemble the current values of one parameter, on every rank; a collective operation."""
        return self.assemble(parameter, self.share(parameter))

    def cut(self, parameter: Any, values: Tensor) -> Tensor:
        """Return this rank's share of whole values; the inverse of `assemble`."""
        if not hasattr(parameter, "ds_id"):
            return values
        size = -(-parameter.ds_numel // self.world)
        share = values.flatten()[self.rank * size : (self.rank + 1) * size]
        return torch.nn.functional.pad(share, (0, size - len(share)))


def save(engine: Any, folder: Path) -> None:
    """Write parameters, optimizer and schedule; a collective operation, which every rank calls."""
    engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)


def restore(engine: Any, folder: Path, *, universal: bool = False) -> None:
    """Read a checkpoint of `save`, or with ``universal`` one of `to_universal`; a collective operation.

    Raises:
        FileNotFoundError: if the folder has no engine state.
    """
    if not (folder / TAG).is_dir():  # deepspeed only asserts
        raise FileNotFoundError(f"{folder}: no learner state to resume from")
    # DeepSpeed reads this at every load; in its configuration it would have to be known at the start.
    engine._config.load_universal_checkpoint = universal
    engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
    engine._config.load_universal_checkpoint = False


def to_universal(folder: Path, target: Path) -> None:
    """Convert a checkpoint for one number of ranks into one that any number of ranks can read."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        Namespace(
            input_folder=str(folder / TAG),
            output_folder=str(target / TAG),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
