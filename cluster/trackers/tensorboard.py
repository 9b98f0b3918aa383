"""Metrics as TensorBoard events, written without torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from cluster.config.metric_names import exported


class TensorBoard:
    """A writer of every number of a metrics line as a scalar."""

    def __init__(self, folder: Path) -> None:
        """Open a new event file below the folder."""
        self.writer = EventFileWriter(str(folder))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Write one line of metrics without values that are missing (None) or not numbers."""
        values = [
            Summary.Value(tag=_tag(name), simple_value=float(value))
            for name, value in metrics.items()
            if isinstance(value, int | float) and name != "step"
        ]
        event = Event(wall_time=time.time(), step=metrics["step"], summary=Summary(value=values))
        self.writer.add_event(event)
        self.writer.flush()

    def close(self) -> None:
        """Write the remaining events."""
        self.writer.close()


def _tag(name: str) -> str:
    """Group names by their first word, so that TensorBoard shows them in sections."""
    valid, step = exported(name)
    group, _, rest = valid.partition("_")
    grouped = group in {"eval", "image", "seconds", "ratio", "reward"}
    return (f"{group}/{rest}" if grouped else f"training/{valid}") + (f".t{step}" if step else "")
