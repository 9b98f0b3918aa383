"""Warnings of libraries in the actors: kept at the cluster's head, shown once by the driver.

An actor's output stays in Ray's own files, so what a library warns of there would reach nobody. An actor
writes each new text into the key-value store of Ray's head, from where the driver takes it: also from an
actor that is busy or has died since.
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
"""Where the texts lie in Ray's key-value store, each under the job's name."""
LIMIT: Final = 20
"""Texts of an actor that are passed on: a text with a number in it may be another one every time."""
LONGEST: Final = 500
"""Characters of a text."""
LATER: Final = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning)
"""Warnings to developers, of what a later version will do; nothing is wrong with the run."""
EXPECTED: Final = {
    "using ZeRO with an untested optimizer": "DeepSpeed calls every optimizer so that is not its own",
}
"""What a healthy run says all the same, and why that does not matter."""


class _Forwarder:
    """Passes on what libraries warn of in this process, every text once."""

    def __init__(self, worker: str) -> None:
        self.worker, self.process = worker, os.getpid()
        self.sent: set[str] = set()
        self.record, self.show = logging.getLogRecordFactory(), warnings.showwarning

    def make_record(self, *arguments: Any, **more: Any) -> logging.LogRecord:
        """Make a log record as before; here every library's passes, whichever handlers it has."""
        record: logging.LogRecord = self.record(*arguments, **more)
        if record.levelno >= logging.WARNING:
            self.pass_on(record.name.partition(".")[0], _message(record))
        return record

    def show_warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        """Show a warning as before."""
        if not issubclass(category, LATER):
            self.pass_on(_package(filename), f"{category.__name__}: {message}")
        self.show(message, category, filename, lineno, file, line)

    def pass_on(self, library: str, text: str) -> None:
        """Write a new text for the driver; a process that was forked has no connection of its own."""
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
        except RpcError:  # without its head the cluster ends; a library's call must not fail of that here
            self.sent.discard(text)


def forward(worker: str) -> None:
    """Pass on to the driver what libraries warn of in this process from now on, in a worker's name."""
    forwarder = _Forwarder(worker)
    logging.setLogRecordFactory(forwarder.make_record)
    warnings.showwarning = forwarder.show_warning


class LibraryWarnings:
    """What libraries warned of in the actors of this job: an event and a line for every text, once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """``tell`` gets a line per text."""
        self.tell = tell
        self.told: set[str] = set()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Look whether there is something new, as often as there are metrics."""
        self.collect()

    def collect(self) -> None:
        """Take what has come since the last time."""
        try:
            entries = [_take(key) for key in sorted(_internal_kv_list(_prefix(), namespace=NAMESPACE))]
        except RpcError as error:  # the run matters more than what its libraries say
            warn("library warnings not read", reason=str(error))
            return
        for entry in entries:
            if entry["text"] not in self.told:
                self.told.add(entry["text"])
                warn("library warning", **entry)
                self.tell(f"{entry['library']} warns in {entry['worker']}: {entry['text']}")


def _take(key: bytes) -> dict[str, str]:
    entry: dict[str, str] = json.loads(_internal_kv_get(key, namespace=NAMESPACE))
    _internal_kv_del(key, namespace=NAMESPACE)
    return entry


def _prefix() -> str:
    return f"warnings/{ray.get_runtime_context().get_job_id()}/"


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # whatever formatting raises is the business of the library's own handlers
        return str(record.msg)


def _package(filename: str) -> str:
    """The package that a file belongs to, by where it is installed."""
    parts = Path(filename).with_suffix("").parts
    installed = [number for number, part in enumerate(parts[:-1]) if part.endswith("-packages")]
    return parts[installed[-1] + 1] if installed else parts[-2] if len(parts) > 1 else filename
