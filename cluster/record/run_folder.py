"""The folder of a run: the paths in it, and their writers, which a kill cannot leave with half a file."""

from __future__ import annotations

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
from cluster.record import names
from cluster.record.files import to_json, write_text
from cluster.record.held_out import Drawn
from cluster.record.json_lines import complete_lines
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
            f"the run folder cannot be written: {error}; --resume continues from the last checkpoint"
        ) from error


class RunFolder:
    """The paths and writers of one run."""

    def __init__(self, path: Path) -> None:
        """Name a run folder, without touching the file system."""
        self.path = path
        self.config = path / names.CONFIG
        self.metrics = path / names.METRICS
        self.events = path / names.LOG
        self.nonfinite = path / names.NONFINITE
        self.ledger = path / names.LEDGER
        self.images = path / names.IMAGES
        self.eval = path / names.EVAL
        self.start = self.eval / "step-000000.parquet"
        self.checkpoints = path / names.CHECKPOINTS
        self.tensorboard = path / names.TENSORBOARD

    def create(self, settings: RunSettings) -> None:
        """Create the folder and write the resolved configuration.

        Raises:
            UserError: if the folder is in use already or cannot be written.
        """
        found = self.path.iterdir() if self.path.is_dir() else [self.path]
        if self.path.exists() and any(not entry.name.startswith(f".{names.CONFIG}.") for entry in found):
            raise UserError(
                f"folder: {self.path} is already used; choose another, or continue with --resume {self.path}"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, to_toml(settings))
        except OSError as error:
            raise UserError(f"folder: cannot write {self.path}: {error.strerror}") from None

    def abandon(self) -> None:
        """Remove the folder if no step was done, so that a refused run can start again under its name."""
        if self.metrics.exists() or self.checkpoints.exists():
            return
        for path in (self.config, self.events):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # the folder has other files
            self.path.rmdir()

    @_writing()
    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line of metrics; NaN and infinity are written as null."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(to_json(metrics) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Read all metrics so far, without a last line that a kill cut short."""
        return _lines(self.metrics) if self.metrics.exists() else []

    def kept(self) -> list[Path]:
        """List the files that a checkpoint copies, with which evaluations and the drift guard compare."""
        return [path for path in (self.metrics, self.start) if path.exists()]

    def rewind(self, step: int) -> None:
        """Remove the records of later steps, before a resumed run makes these steps again."""
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
        """Append the cause of a skipped update: the seeds of trajectories whose loss was not finite."""
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
        """Append the images of a step (or ``eval_images`` of its evaluation) that are not finite, if any."""
        if broken:
            with self.nonfinite.open("a", encoding="utf-8") as file:
                file.write(to_json({"step": step, kind: broken}) + "\n")

    @_writing()
    def save_pair(self, step: int, group_id: int, images: NDArray[np.uint8], pair: Sequence[int]) -> None:
        """Save candidates of a group under names that match the ledger's rows."""
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
        """Write held-out scores as Parquet, and the images that are not broken (None) as files."""
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
    return complete_lines(path.read_bytes())[0]


def _strict(scores: Scores, count: int) -> NDArray[np.float64]:
    return np.full(count, np.nan) if scores.strict is None else scores.strict


def _save_png(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
