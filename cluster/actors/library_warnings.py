"""Warnings of libraries in the actors, which the driver collects from the cluster's head and prints once.

An actor's output stays in Ray's own files, where nobody would read a library's warnings. So an actor writes
each new text into the key-value store of Ray's head, and the driver takes it from there, even if the actor is
busy or has died since.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, TextIO

import ray
from ray.exceptions import RpcError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from cluster.record.events import warn

NAMESPACE: Final = "noisemargin"
"""The namespace of the texts in Ray's key-value store."""
LIMIT: Final = 20
"""Texts forwarded per actor, since a text with a number in it may differ every time."""
LONGEST: Final = 500
"""Characters of a text at most."""
LATER: Final = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning)
"""Warnings to developers about later versions, which do not concern the run."""
EXPECTED: Final = {
    "using ZeRO with an untested optimizer": "DeepSpeed says so of every optimizer but its own",
    "split will not be applied": "diffusers' plan for Wan also names timesteps of a form that is not used",
}
"""Patterns of warnings in a healthy run, with the reason why each does not matter."""


class _Forwarder:
    """Forwards the warnings of libraries in this process, every text once."""

    def __init__(self, worker: str) -> None:
        self.worker, self.process = worker, os.getpid()
        self.sent: set[str] = set()
        self.record, self.show = logging.getLogRecordFactory(), warnings.showwarning

    def make_record(self, *arguments: Any, **more: Any) -> logging.LogRecord:
        """Make a log record as before: the one call common to all libraries, whatever their handlers."""
        record: logging.LogRecord = self.record(*arguments, **more)
        if record.levelno >= logging.WARNING:
            self.forward(record.name.partition(".")[0], _message(record))
        return record

    def show_warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        """Show a warning as before."""
        if not issubclass(category, LATER):
            self.forward(_package(filename), f"{category.__name__}: {message}")
        self.show(message, category, filename, lineno, file, line)

    def forward(self, library: str, text: str) -> None:
        """Write a new text for the driver, except in a forked process, which has no connection to Ray."""
        text = " ".join(text.split())[:LONGEST]
        known = text in self.sent or len(self.sent) > LIMIT or os.getpid() != self.process
        if known or any(re.search(pattern, text) for pattern in EXPECTED):
            return
        self.sent.add(text)
        if len(self.sent) > LIMIT:
            text = f"more than {LIMIT} different warnings; the others are in Ray's log files only"
        entry = {"library": library, "text": text, "worker": self.worker}
        key = _prefix() + sha256(f"{library} {text}".encode()).hexdigest()
        try:
            _internal_kv_put(key, json.dumps(entry), overwrite=False, namespace=NAMESPACE)
        except RpcError:  # the cluster ends with its head, but the library's call must not fail here
            self.sent.discard(text)


def forward(worker: str) -> None:
    """Start to forward the warnings of libraries in this process to the driver, under a worker's name."""
    forwarder = _Forwarder(worker)
    logging.setLogRecordFactory(forwarder.make_record)
    warnings.showwarning = forwarder.show_warning


class LibraryWarnings:
    """The warnings of libraries in the actors of this job, reported once each by an event and a line."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        """Report each text by ``print_line``."""
        self.print_line = print_line
        self.reported: set[str] = set()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Collect new warnings, as a tracker of the metrics of each step."""
        self.collect()

    def collect(self) -> None:
        """Report the warnings since the last call."""
        try:
            entries = [_take(key) for key in sorted(_internal_kv_list(_prefix(), namespace=NAMESPACE))]
        except RpcError as error:  # not worth ending the run
            warn("library warnings not read", reason=str(error))
            return
        for entry in entries:
            if entry["text"] not in self.reported:
                self.reported.add(entry["text"])
                warn("library warning", **entry)
                self.print_line(f"{entry['library']} warns in {entry['worker']}: {entry['text']}")


def _take(key: bytes) -> dict[str, str]:
    entry: dict[str, str] = json.loads(_internal_kv_get(key, namespace=NAMESPACE))
    _internal_kv_del(key, namespace=NAMESPACE)
    return entry


def _prefix() -> str:
    return f"warnings/{ray.get_runtime_context().get_job_id()}/"


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # the library's own handlers report an error of formatting
        return str(record.msg)


def _package(filename: str) -> str:
    """Return the package of a file, from its path."""
    parts = Path(filename).with_suffix("").parts
    installed = [number for number, part in enumerate(parts[:-1]) if part.endswith("-packages")]
    return parts[installed[-1] + 1] if installed else parts[-2] if len(parts) > 1 else filename
