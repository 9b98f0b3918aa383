"""The study's Parquet files, written atomically: one per arm and seed, two per variance design."""

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
    """Write rows atomically, with their description and the machine's in the schema."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps({**about, **machine()})})
    write_table(path, table)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read the rows of a file and their description.

    Raises:
        UserError: if the file is not one of the study's.
    """
    try:
        return pq.read_table(path).to_pylist(), read_about(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot read the study's results: {error}") from None


def read_about(path: Path) -> dict[str, Any]:
    """Read the description of a file's rows.

    Raises:
        UserError: if the file has none.
    """
    metadata = pq.read_schema(path).metadata or {}
    if _KEY not in metadata:
        raise UserError(f"{path}: not written by the study (no {_KEY.decode()} in its schema)")
    return dict(json.loads(metadata[_KEY]))


def finished(path: Path, about: Mapping[str, Any]) -> bool:
    """Return whether a file of these settings exists already.

    Raises:
        UserError: if the file has results of other settings.
    """
    if not path.exists():
        return False
    if _completed(read_about(path)["config"]) != _completed(about["config"]):
        raise UserError(f"{path} has results of other settings; choose another --folder")
    return True


def _completed(config: str) -> str:
    """Rewrite an older version's configuration as this version does; the design follows in a comment."""
    text, mark, design = config.partition("\n# ")
    try:
        return to_toml(RunSettings.model_validate(tomllib.loads(text))) + mark + design
    except ValueError:  # not a configuration of this version, so it is compared as it is
        return config


def machine() -> dict[str, Any]:
    """Describe the machine: processor, cores, current load, and Python's version."""
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
