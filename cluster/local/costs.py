"""Measure the cost of a step: seconds by stage, and rows that pass through transformers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Meter:
    """A counter of rows in forward passes, with and without a backward pass; a guided image is two rows."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def count(self, transformer: torch.nn.Module) -> None:
        """Count this model's passes from now on."""
        transformer.register_forward_hook(self._add)

    def take(self) -> dict[str, int]:
        """Return the counts since the last call."""
        found = {"forwards": self.forwards, "backwards": self.backwards}
        self.forwards = self.backwards = 0
        return found

    def _add(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        rows = len(output[0])
        self.forwards += rows
        self.backwards += rows * torch.is_grad_enabled()


class Clock:
    """The seconds of every stage, of wall-clock time and of this process's CPU time."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage; blocks of this process do not overlap."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._add(f"seconds_{stage}", time.perf_counter() - wall)
            self._add(f"cpu_seconds_{stage}", time.process_time() - cpu)

    def take(self) -> dict[str, float]:
        """Return ``seconds_STAGE`` and ``cpu_seconds_STAGE`` since the last call."""
        found, self._seconds = self._seconds, {}
        return found

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
