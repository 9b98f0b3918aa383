"""The frozen start policy of the KL: the model without its adapter, or a second copy of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from learner.engine import build_frozen
from learner.settings import LearnerSettings
from rollout.families.transformer import adapter_off
from rollout.settings import ModelSettings


class Reference:
    """The model to call for the reference policy; a copy is kept on the CPU between updates."""

    def __init__(
        self, transformer: Any, model: ModelSettings, learner: LearnerSettings, device: str, *, used: bool
    ) -> None:
        """Copy the model if it is used and switching an adapter off would not restore the start policy."""
        self.transformer, self.model, self.learner, self.device = transformer, model, learner, device
        self.copy: Any = None
        if used and not model.lora_rank:
            self.copy = copy.deepcopy(transformer).eval().requires_grad_(False)
        self.partitioned = self.copy is not None and learner.zero_stage == 3

    def join(self) -> None:
        """Partition the copy over the ranks under ZeRO-3; a collective operation."""
        if self.partitioned:
            self.copy = build_frozen(self.copy, self.learner, self.model.dtype)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Keep the copy on the device while the context lasts, which is an update."""
        moves = self.copy is not None and not self.partitioned and self.device != "cpu"
        if moves:
            self.copy.to(self.device)
        try:
            yield
        finally:
            if moves:
                self.copy.to("cpu")

    @contextmanager
    def active(self, engine: Any) -> Iterator[Any]:
        """Yield the model to call, without gradients; ``engine`` runs the policy."""
        with torch.no_grad():
            if self.copy is not None:
                yield self.copy
                return
            with adapter_off(self.transformer):
                yield engine
