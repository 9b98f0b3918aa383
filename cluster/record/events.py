"""What happens in a run, as JSON lines in its folder: restarts, retries, checkpoints, alarms.

Metrics say how a run learns; these say what befell it, for whoever looks in the morning. Everyone notes
events through here; step and group are added from the context, which every task of the loop inherits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cluster.config.version import commit, version
from cluster.record.files import to_json
from cluster.record.nonfinite import BROKEN, EVAL_BROKEN

NAME: Final = "log.jsonl"
"""The file in the run folder."""
COUNTED: Final = {
    BROKEN: "images not finite",
    EVAL_BROKEN: "held-out images not finite",
    "dropped_groups": "groups dropped",
    "skipped_updates": "updates skipped",
}
"""Metrics that count what went wrong, and the event that each is noted as."""
STEP: ContextVar[int | None] = ContextVar("step", default=None)
"""The step that is being made, counted from one."""
GROUP: ContextVar[int | None] = ContextVar("group", default=None)
"""The group that is being produced."""

_logger: Final = logging.getLogger("noisemargin")
_logger.addHandler(logging.NullHandler())
_logger.propagate = False


def note(event: str, **fields: Any) -> None:
    """Note something that is part of a run's life."""
    _logger.info(event, extra={"fields": fields})


def warn(event: str, **fields: Any) -> None:
    """Note something that somebody should know of, though the run goes on."""
    _logger.warning(event, extra={"fields": fields})


def watch(metrics: Mapping[str, Any]) -> None:
    """Note what a step's metrics say that went wrong in it."""
    for name, story in metrics.get("alarms", {}).items():
        warn("guard alarm", metric=name, story=story)
    for key, event in COUNTED.items():
        if count := metrics.get(key):
            warn(event, count=int(count))
    if missing := int(metrics.get("candidates", 0) - metrics.get("valid", 0)):
        warn("rewards missing", count=missing)
    if metrics.get("selected") == 0:
        warn("no margin in the whole batch")


@contextmanager
def recording(folder: Path, run: str, **start: Any) -> Iterator[None]:
    """Keep the events of a run in its folder, from its start (or its next one) to how it ended."""
    handler = logging.FileHandler(folder / NAME, encoding="utf-8", delay=True)
    handler.setFormatter(_JsonLines(run))
    level = _logger.level
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    began = time.monotonic()
    try:
        note("run started", version=version(), commit=commit() or None, **start)
        yield
    except BaseException as error:
        _logger.error("run failed", extra={"fields": {"reason": _told(error)}})
        raise
    else:
        note("run ended", seconds=round(time.monotonic() - began, 1))
    finally:
        _logger.removeHandler(handler)
        _logger.setLevel(level)
        handler.close()


def _told(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_told(one) for one in error.exceptions)
    return f"{type(error).__name__}: {error}".strip(": ")


class _JsonLines(logging.Formatter):
    """One object per event: time, level, event, run, step, group, then what the event brings with it."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run

    def format(self, record: logging.LogRecord) -> str:
        place = {"run": self.run, "step": STEP.get(), "group": GROUP.get()}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{key: value for key, value in place.items() if value is not None},
            **record.__dict__["fields"],
        }
        return to_json(line, default=str)
