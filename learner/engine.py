"""The DeepSpeed engine of one rank; the only file that imports deepspeed."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch

from learner.settings import LearnerSettings
from rollout.tensors import NamedParameters

COLLECTIVE_TIMEOUT: Final = timedelta(minutes=10)


def join(rank: int, world: int, address: str, port: int, *, gpu: bool) -> None:
    """Join the process group of all ranks: NCCL on GPUs, gloo on CPUs, no launcher needed."""
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


def build_engine(transformer: Any, parameters: NamedParameters, settings: LearnerSettings, dtype: str) -> Any:
    """Wrap the transformer; its trained parameters get a plain AdamW, which needs no compiled op."""
    import deepspeed

    trained = [p for _, p in parameters]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Warmup(settings.warmup))
    engine, *_ = deepspeed.initialize(
        model=transformer,
        model_parameters=trained,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_config(settings, dtype),
    )
    return engine


class Warmup:
    """A linear rise of the learning rate over the first optimizer steps, then constant."""

    def __init__(self, steps: int) -> None:
        """``steps`` of 0 starts at the full rate."""
        self.steps = steps

    def __call__(self, step: int) -> float:
        """The factor of the learning rate at an optimizer step."""
        return min(1.0, (step + 1) / (self.steps + 1))


def deepspeed_config(settings: LearnerSettings, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours.

    Accumulation is ours: each loss carries its exact weight, and `step` is called once per update.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": settings.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def save(engine: Any, folder: Path) -> None:
    """Write parameters, optimizer and schedule; collective, every rank calls it."""
    engine.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)


def restore(engine: Any, folder: Path) -> None:
    """Read what `save` wrote; collective.

    Raises:
        FileNotFoundError: if the folder holds no engine state.
    """
    if not (folder / "engine").is_dir():  # deepspeed only asserts
        raise FileNotFoundError(f"{folder}: no learner state to resume from")
    engine.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
