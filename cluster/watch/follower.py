"""What a run folder says about how a run goes, read again and again as it grows."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from fsspec.core import url_to_fs

from cluster.config.errors import UserError
from cluster.record.events import NAME

RECENT: Final = 20
"""Steps that averages and the time to go are taken from."""
SILENT: Final = 10
"""Usual steps without a sign of life after which a run counts as silent, and at least ..."""
SILENT_SECONDS: Final = 300.0
"""... so many seconds, since an evaluation or a start may take long."""

Row = Mapping[str, Any]


class Lines:
    """The JSON lines of a file that grows; only what is new is read, until the file is written anew."""

    def __init__(self, filesystem: Any, path: str) -> None:
        """Nothing is read yet."""
        self.filesystem, self.path = filesystem, path
        self.offset = 0
        self.rows: list[Row] = []
        self.modified: float | None = None

    def look(self) -> list[Row]:
        """All lines so far; none if there is no such file. A last one that is being written waits."""
        try:
            size = int(self.filesystem.info(self.path)["size"])
            with suppress(NotImplementedError):  # web servers need not say it
                self.modified = self.filesystem.modified(self.path).timestamp()
        except FileNotFoundError:
            return []
        if size < self.offset:  # a resumed run forgets what came after its checkpoint
            self.offset, self.rows = 0, []
        if size > self.offset:
            whole, cut, _ = self.filesystem.cat_file(self.path, start=self.offset, end=size).rpartition(b"\n")
            self.offset += len(whole) + len(cut)
            self.rows += [json.loads(line) for line in whole.splitlines() if line.strip()]
        return self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A run at one moment."""

    config: Row
    steps: Sequence[Row]
    evaluations: Sequence[Row]
    events: Sequence[Row]
    age: float | None

    @property
    def step(self) -> int:
        """The last step that was finished."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def planned(self) -> int:
        """How many steps it is to have."""
        return int(self.config.get("steps", 0))

    @property
    def recent(self) -> Sequence[Row]:
        """The last steps."""
        return self.steps[-RECENT:]

    @property
    def seconds_per_step(self) -> float | None:
        """How long a step takes of late."""
        return median(row["seconds_step"] for row in self.recent) if self.steps else None

    @property
    def left(self) -> float | None:
        """Seconds to go, without evaluations."""
        pace = self.seconds_per_step
        return None if pace is None else pace * max(0, self.planned - self.step)

    @property
    def ended(self) -> bool:
        """Whether its last event is an end, or, without events, whether all steps are there."""
        if self.events:
            return self.events[-1]["event"] in ("run ended", "run failed")
        return self.step >= self.planned

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.ended:
            if self.events and self.events[-1]["event"] == "run failed":
                return "failed"
            return "finished" if self.step >= self.planned else "stopped"
        limit = max(SILENT_SECONDS, SILENT * (self.seconds_per_step or 0))
        return "silent" if self.age is not None and self.age > limit else "running"

    def counted(self, event: str) -> int:
        """How often an event has happened."""
        return sum(row["event"] == event for row in self.events)


class Follower:
    """Reads one run folder."""

    def __init__(self, url: str) -> None:
        """Read what does not change.

        Raises:
            UserError: if there is no run, or its place cannot be reached.
        """
        self.url = url
        try:
            self.filesystem, root = url_to_fs(url, use_listings_cache=False)
            config = self.filesystem.cat_file(f"{root}/config.toml")
        except FileNotFoundError:
            raise UserError(f"{url} is no run folder: it has no config.toml") from None
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"cannot read {url}: {error}") from None
        try:
            self.config = tomllib.loads(config.decode("utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{url}/config.toml: {error}") from None
        self.metrics, self.log = (
            Lines(self.filesystem, f"{root}/{name}") for name in ("metrics.jsonl", NAME)
        )

    def look(self) -> Watched:
        """The run as it is now."""
        lines, events = self.metrics.look(), self.log.look()
        steps = {row["step"]: row for row in lines if row["step"] > 0}  # a resumed run says some again
        evaluations = {row["step"]: row for row in lines if row.get("eval_reward") is not None}
        times = [file.modified for file in (self.metrics, self.log) if file.modified is not None]
        return Watched(
            config=self.config,
            steps=list(steps.values()),
            evaluations=list(evaluations.values()),
            events=list(events),
            age=time.time() - max(times) if times else None,
        )
