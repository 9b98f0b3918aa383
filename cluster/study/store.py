"""The study's Parquet files: one per arm and seed, two per variance design; whole or not there at all."""

from __future__ import annotations

import json
import os
import platform
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.config.sources import to_toml
from selection.ledger import write_table

_KEY: Final = b"noisemargin.study"

Row = Mapping[str, Any]


def write_rows(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write rows and, in the schema, what they are about; a kill leaves the old file or none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps({**about, **machine()})})
    write_table(path, table)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a file and what they are about.

    Raises:
        UserError: if the file is none of the study's.
    """
    try:
        return pq.read_table(path).to_pylist(), read_about(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot read the study's results: {error}") from None


def read_about(path: Path) -> dict[str, Any]:
    """What a file's rows are about.

    Raises:
        UserError: if the file does not say.
    """
    metadata = pq.read_schema(path).metadata or {}
    if _KEY not in metadata:
        raise UserError(f"{path}: not written by the study (no {_KEY.decode()} in its schema)")
    return dict(json.loads(metadata[_KEY]))


def finished(path: Path, about: Mapping[str, Any]) -> bool:
    """Whether a file is there already, and of these very settings.

    Raises:
        UserError: if it holds results of others, which must not be mixed.
    """
    if not path.exists():
        return False
    if _completed(read_about(path)["config"]) != _completed(about["config"]):
        raise UserError(f"{path} holds results of other settings; choose another --folder")
    return True


def _completed(config: str) -> str:
    """A configuration of an older version as this one writes it; the design stands after it in a comment."""
    text, mark, design = config.partition("\n# ")
    try:
        return to_toml(RunSettings.model_validate(tomllib.loads(text))) + mark + design
    except ValueError:  # it is no configuration, or none of this version: only the very same will do
        return config


def machine() -> dict[str, Any]:
    """The processor, its cores, and how busy they were when the rows were written."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
