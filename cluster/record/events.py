"""Events of a run, as JSON lines in its folder: restarts, retries, checkpoints, alarms.

Metrics record learning; events record incidents. Every part of the service logs them through `note` and
`warn`, which add step and group from the context that every task of the loop inherits.
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
from cluster.record.names import LOG
from cluster.record.nonfinite import BROKEN, EVAL_BROKEN

COUNTED: Final = {
    BROKEN: "images not finite",
    EVAL_BROKEN: "held-out images not finite",
    "dropped_groups": "groups dropped",
    "skipped_updates": "updates skipped",
}
"""Metrics that count failures, and the event that each is logged as."""
STEP: ContextVar[int | None] = ContextVar("step", default=None)
"""The step in progress, counted from one."""
GROUP: ContextVar[int | None] = ContextVar("group", default=None)
"""The group in production."""

_logger: Final = logging.getLogger("noisemargin")
_logger.addHandler(logging.NullHandler())
_logger.propagate = False


def note(event: str, **fields: Any) -> None:
    """Log an event of normal operation."""
    _logger.info(event, extra={"fields": fields})


def warn(event: str, **fields: Any) -> None:
    """Log an event that the user should know of, although the run continues."""
    _logger.warning(event, extra={"fields": fields})


def watch(metrics: Mapping[str, Any]) -> None:
    """Log the failures that a step's metrics count."""
    for name, message in metrics.get("alarms", {}).items():
        warn("guard alarm", metric=name, story=message)
    for key, event in COUNTED.items():
        if count := metrics.get(key):
            warn(event, count=int(count))
    if missing := int(metrics.get("candidates", 0) - metrics.get("valid", 0)):
        warn("rewards missing", count=missing)
    if metrics.get("selected") == 0:
        warn("no margin in the whole batch")


@contextmanager
def recording(folder: Path, run: str, **start: Any) -> Iterator[None]:
    """Write the events of a block to the run folder, its start and its outcome among them."""
    handler = logging.FileHandler(folder / LOG, encoding="utf-8", delay=True)
    handler.setFormatter(_JsonLines(run))
    level = _logger.level
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    began = time.monotonic()
    try:
        note("run started", version=version(), commit=commit() or None, **start)
        yield
    except BaseException as error:
        _logger.error("run failed", extra={"fields": {"reason": _describe(error)}})
        raise
    else:
        note("run ended", seconds=round(time.monotonic() - began, 1))
    finally:
        _logger.removeHandler(handler)
        _logger.setLevel(level)
        handler.close()


def _describe(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(_describe, error.exceptions))
    return f"{type(error).__name__}: {error}".strip(": ")


class _JsonLines(logging.Formatter):
    """One object per event: time, level, event, run, step, group, then the event's own fields."""

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
