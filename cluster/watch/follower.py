"""Read the progress of a run from its folder, repeatedly as it grows."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from fsspec.core import url_to_fs

from cluster.config.errors import UserError
from cluster.record.json_lines import Row, complete_lines
from cluster.record.names import CONFIG, LOG, METRICS

RECENT: Final = 20
"""Latest steps from which averages and the remaining time are computed."""
SILENT: Final = 10
"""Typical steps without a new line after which a run counts as silent, and at least ..."""
SILENT_SECONDS: Final = 300.0
"""... so many seconds, since an evaluation or a start may take long."""


class Lines:
    """The JSON lines of a growing file, of which only new ones are read, unless the file was rewritten."""

    def __init__(self, filesystem: Any, path: str) -> None:
        """Name the file, without reading it."""
        self.filesystem, self.path = filesystem, path
        self.offset = 0
        self.rows: list[Row] = []
        self.modified: float | None = None

    def look(self) -> list[Row]:
        """Return all complete lines so far; none if the file does not exist."""
        try:
            size = int(self.filesystem.info(self.path)["size"])
            with suppress(NotImplementedError):  # not every web server reports it
                self.modified = self.filesystem.modified(self.path).timestamp()
        except FileNotFoundError:
            return []
        if size < self.offset:  # a resumed run has removed the lines after its checkpoint
            self.offset, self.rows = 0, []
        if size > self.offset:
            rows, taken = complete_lines(self.filesystem.cat_file(self.path, start=self.offset, end=size))
            self.offset += taken
            self.rows += rows
        return self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """The state of a run at one moment."""

    config: Row
    steps: Sequence[Row]
    evaluations: Sequence[Row]
    events: Sequence[Row]
    age: float | None

    @property
    def step(self) -> int:
        """The last finished step."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def planned(self) -> int:
        """The number of steps asked for by the last start, else by the configuration, that of the first."""
        starts = [event for event in self.events if "steps" in event and event["event"] == "run started"]
        return int((starts[-1] if starts else self.config).get("steps", 0))

    @property
    def recent(self) -> Sequence[Row]:
        """The last steps."""
        return self.steps[-RECENT:]

    @property
    def seconds_per_step(self) -> float | None:
        """The median seconds of the last steps."""
        return median(row["seconds_step"] for row in self.recent) if self.steps else None

    @property
    def left(self) -> float | None:
        """The remaining seconds, without evaluations."""
        pace = self.seconds_per_step
        return None if pace is None else pace * max(0, self.planned - self.step)

    @property
    def ended(self) -> bool:
        """True if its last event is an end or, without events, if all steps are done."""
        if self.events:
            return self.events[-1]["event"] in ("run ended", "run failed")
        return self.step >= self.planned

    @property
    def state(self) -> str:
        """The state in one word, such as ``running``."""
        if self.ended:
            if self.events and self.events[-1]["event"] == "run failed":
                return "failed"
            return "finished" if self.step >= self.planned else "stopped"
        limit = max(SILENT_SECONDS, SILENT * (self.seconds_per_step or 0))
        return "silent" if self.age is not None and self.age > limit else "running"

    def counted(self, event: str) -> int:
        """Count the events of a name."""
        return sum(row["event"] == event for row in self.events)


class Follower:
    """The reader of one run folder."""

    def __init__(self, url: str) -> None:
        """Read the configuration, which does not change.

        Raises:
            UserError: if the URL is not that of a run folder, or cannot be reached.
        """
        self.url = url
        try:
            self.filesystem, root = url_to_fs(url, use_listings_cache=False)
            config = self.filesystem.cat_file(f"{root}/{CONFIG}")
        except FileNotFoundError:
            raise UserError(f"{url} is not a run folder: it has no {CONFIG}") from None
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"cannot read {url}: {error}") from None
        try:
            self.config = tomllib.loads(config.decode("utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{url}/{CONFIG}: {error}") from None
        self.metrics, self.log = (Lines(self.filesystem, f"{root}/{name}") for name in (METRICS, LOG))

    def look(self) -> Watched:
        """Read the current state of the run."""
        lines, events = self.metrics.look(), self.log.look()
        steps = {row["step"]: row for row in lines if row["step"] > 0}  # once each, also after a resume
        evaluations = {row["step"]: row for row in lines if row.get("eval_reward") is not None}
        times = [file.modified for file in (self.metrics, self.log) if file.modified is not None]
        return Watched(
            config=self.config,
            steps=list(steps.values()),
            evaluations=list(evaluations.values()),
            events=list(events),
            age=time.time() - max(times) if times else None,
        )
