"""The run folder: everything a run leaves behind, written so that a kill leaves no half file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from cluster.config.errors import FolderError, UserError
from cluster.config.settings import RunSettings
from cluster.config.sources import to_toml
from cluster.record.events import NAME as LOG
from cluster.record.files import to_json, write_text
from cluster.record.held_out import Drawn
from rewards.combine import Scores
from rollout.records import CandidateGroup
from selection.ledger import ledger_table, write_ledger, write_table
from selection.records import Kept, Selection


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FolderError(
            f"the run folder cannot be written: {error}; --resume goes on from the last checkpoint"
        ) from error


class RunFolder:
    """Paths and writers of one run."""

    def __init__(self, path: Path) -> None:
        """Name a run folder; nothing is touched yet."""
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.nonfinite = path / "nonfinite.jsonl"
        self.ledger = path / "ledger"
        self.images = path / "images"
        self.eval = path / "eval"
        self.start = self.eval / "step-000000.parquet"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"

    def create(self, settings: RunSettings) -> None:
        """Make the folder and write the resolved configuration.

        Raises:
            UserError: if the folder is in use already or cannot be written.
        """
        found = self.path.iterdir() if self.path.is_dir() else [self.path]
        if self.path.exists() and any(not entry.name.startswith(".config.toml.") for entry in found):
            raise UserError(
                f"folder: {self.path} is already used; choose another, or continue with --resume {self.path}"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, to_toml(settings))
        except OSError as error:
            raise UserError(f"folder: cannot write {self.path}: {error.strerror}") from None

    def abandon(self) -> None:
        """Give the name back if nothing was done: a run that was refused may be started again as it was."""
        if self.metrics.exists() or self.checkpoints.exists():
            return
        for path in (self.config, self.path / LOG):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # something else lies there
            self.path.rmdir()

    @_writing()
    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line of metrics; a number that is none becomes null, for every JSON reader's sake."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(to_json(metrics) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """All metrics so far; a last line that a kill cut short is left out."""
        return _lines(self.metrics) if self.metrics.exists() else []

    def kept(self) -> list[Path]:
        """What a checkpoint keeps of the folder: all that later evaluations and the guard compare with."""
        return [path for path in (self.metrics, self.start) if path.exists()]

    def rewind(self, step: int) -> None:
        """Forget what was logged after a step, before a resumed run does it again."""
        for path in (self.metrics, self.nonfinite):
            if path.exists():
                kept = [line for line in _lines(path) if line["step"] <= step]
                write_text(path, "".join(to_json(line) + "\n" for line in kept))
        for folder in (self.ledger, self.eval):
            for path in folder.glob("step-*.parquet"):
                if int(path.stem.removeprefix("step-")) > step:
                    path.unlink()

    @_writing()
    def record(
        self, step: int, groups: Sequence[CandidateGroup], scores: Sequence[Scores], selection: Selection
    ) -> None:
        """Write the step's rows of the ledger."""
        write_ledger(self.ledger, step, ledger_table(step, groups, scores, selection))

    @_writing()
    def record_nonfinite(self, step: int, groups: Sequence[CandidateGroup], suspects: Sequence[Kept]) -> None:
        """Append what led to a skipped update: the trajectories whose loss was not finite, by their seeds."""
        by_id = {group.group_id: group for group in groups}
        found = [
            {
                "group": kept.group_id,
                "candidate": kept.candidate,
                "prompt": by_id[kept.group_id].prompt.text,
                **asdict(by_id[kept.group_id].noises[kept.candidate]),
                "advantage": kept.advantage,
            }
            for kept in suspects
        ]
        with self.nonfinite.open("a", encoding="utf-8") as file:
            file.write(to_json({"step": step, "trajectories": found}) + "\n")

    @_writing()
    def record_broken(self, step: int, broken: Sequence[Mapping[str, Any]], kind: str = "images") -> None:
        """Append which images of a step (or ``eval_images`` of its evaluation) are not finite, if any."""
        if broken:
            with self.nonfinite.open("a", encoding="utf-8") as file:
                file.write(to_json({"step": step, kind: broken}) + "\n")

    @_writing()
    def save_pair(self, step: int, group_id: int, images: NDArray[np.uint8], pair: Sequence[int]) -> None:
        """Save candidates of a group, named so that they join to the ledger."""
        folder = self.images / f"step-{step:06d}"
        for candidate in pair:
            _save_png(folder / f"g{group_id:06d}-c{candidate:02d}.png", images[candidate])

    @_writing()
    def save_evaluation(
        self,
        step: int,
        drawn: Sequence[Drawn],
        scores: Scores,
        images: Iterable[NDArray[np.uint8] | None],
    ) -> None:
        """Write held-out scores as Parquet and the images beside; of one that is broken (None) no file."""
        table = pa.table(
            {
                "prompt_index": [prompt.index for prompt, _, _ in drawn],
                "sample": [sample for _, sample, _ in drawn],
                "prompt": [prompt.text for prompt, _, _ in drawn],
                "noise_seed": pa.array([noise.initial for _, _, noise in drawn], pa.uint64()),
                "reward": pa.array(scores.total, from_pandas=True),
                "strict": pa.array(_strict(scores, len(drawn)), pa.float64(), from_pandas=True),
                **{f"reward_{k}": pa.array(v, from_pandas=True) for k, v in scores.rewards.items()},
            }
        )
        write_table(self.eval / f"step-{step:06d}.parquet", table)
        folder = self.images / f"eval-{step:06d}"
        for (prompt, sample, _), image in zip(drawn, images, strict=False):  # only the first are shown
            if image is not None:
                _save_png(folder / f"p{prompt.index:03d}-s{sample}.png", image)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; a last one that a kill cut short is left out."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _strict(scores: Scores, count: int) -> NDArray[np.float64]:
    return np.full(count, np.nan) if scores.strict is None else scores.strict


def _save_png(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
