"""The frozen start policy of the KL: the model without its adapter, or a second copy of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from learner.engine import build_frozen, partition
from learner.settings import LearnerSettings
from rollout.families.transformer import adapter_off
from rollout.settings import ModelSettings


class Reference:
    """The model to call for the reference policy; a copy stays on the CPU, and is lent to the device."""

    def __init__(
        self, transformer: Any, model: ModelSettings, learner: LearnerSettings, device: str, *, used: bool
    ) -> None:
        """Copy the model if it is used and switching an adapter off would not restore the start policy."""
        self.transformer, self.model, self.learner, self.device = transformer, model, learner, device
        self.copy: Any = None
        if used and not model.lora_rank:
            self.copy = copy.deepcopy(transformer).eval().requires_grad_(False)
        self.partitioned = self.copy is not None and learner.zero_stage == 3
        self.pinned: list[tuple[Tensor, Tensor]] = []
        if self.copy is not None and not self.partitioned and device != "cpu":
            self.pinned = [(p, p.detach().cpu().pin_memory()) for p in _tensors(self.copy)]
            self._return()

    def join(self) -> None:
        """Partition the copy over the ranks under ZeRO-3; a collective operation."""
        if self.partitioned:
            partition(self.copy, self.learner, self.device)
            self.copy = build_frozen(self.copy, self.learner)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Keep the copy on the device while the context lasts, which is an update."""
        for tensor, kept in self.pinned:
            tensor.data = kept.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            self._return()

    def _return(self) -> None:
        """Free the device; the copy is frozen, so nothing has to be copied back."""
        for tensor, kept in self.pinned:
            tensor.data = kept

    @contextmanager
    def active(self, engine: Any) -> Iterator[Any]:
        """Yield the model to call, without gradients; ``engine`` runs the policy."""
        with torch.no_grad():
            if self.copy is not None:
                yield self.copy
                return
            with adapter_off(self.transformer):
                yield engine


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
