"""The ledger: one row per candidate, selected or not, in one Parquet file per step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rewards.combine import Scores
from rollout.files import atomic
from rollout.records import CandidateGroup
from selection.records import Selection


def ledger_schema(rewards: Sequence[str]) -> pa.Schema:
    """Return the columns: the candidate's identity, its scores, and the outcome of selection.

    ``prompt_index`` identifies the prompt and ``prompt`` is its text. ``reward`` is the total.
    Rewards are null where they are missing, ``advantage`` where the candidate was not selected. ``seconds``
    is the candidate's share of the time to sample its group.
    """
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("group", pa.int64(), nullable=False),
            pa.field("candidate", pa.int32(), nullable=False),
            pa.field("prompt_index", pa.int64(), nullable=False),
            pa.field("prompt", pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field("noise_seed", pa.uint64(), nullable=False),
            pa.field("path_seed", pa.uint64(), nullable=False),
            pa.field("policy_version", pa.int64(), nullable=False),
            pa.field("reward", pa.float64()),
            *(pa.field(f"reward_{name}", pa.float64()) for name in rewards),
            pa.field("valid", pa.bool_(), nullable=False),
            pa.field("selected", pa.bool_(), nullable=False),
            pa.field("advantage", pa.float64()),
            pa.field("seconds", pa.float64(), nullable=False),
        ]
    )


def ledger_table(
    step: int, groups: Sequence[CandidateGroup], scores: Sequence[Scores], selection: Selection
) -> pa.Table:
    """Build one row per candidate of the step's groups, in order; ``scores[i]`` are those of ``groups[i]``.

    Raises:
        ValueError: if a group has another number of scores than candidates.
    """
    advantages = {(kept.group_id, kept.candidate): kept.advantage for kept in selection.kept}
    names = sorted({name for score in scores for name in score.rewards})
    rows = [
        row
        for group, score in zip(groups, scores, strict=True)
        for row in _group_rows(step, group, score, advantages)
    ]
    return pa.Table.from_pylist(rows, schema=ledger_schema(names))


def _group_rows(
    step: int, group: CandidateGroup, scores: Scores, advantages: dict[tuple[int, int], float]
) -> list[dict[str, Any]]:
    if len(group.noises) != len(scores.total):
        raise ValueError(
            f"step {step}: group {group.group_id} has {len(group.noises)} candidates, "
            f"but {len(scores.total)} scores"
        )
    return [
        {
            "step": step,
            "group": group.group_id,
            "candidate": candidate,
            "prompt_index": group.prompt.index,
            "prompt": group.prompt.text,
            "noise_seed": noise.initial,
            "path_seed": noise.path,
            "policy_version": group.version,
            "reward": _or_null(scores.total[candidate]),
            **{f"reward_{name}": _or_null(values[candidate]) for name, values in scores.rewards.items()},
            "valid": bool(scores.valid[candidate] and np.isfinite(scores.total[candidate])),
            "selected": (group.group_id, candidate) in advantages,
            "advantage": advantages.get((group.group_id, candidate)),
            "seconds": group.seconds / len(group.noises),
        }
        for candidate, noise in enumerate(group.noises)
    ]


def _or_null(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def ledger_path(folder: Path, step: int) -> Path:
    """Return the path of a step's rows in a ledger folder."""
    return folder / f"step-{step:06d}.parquet"


def write_ledger(folder: Path, step: int, table: pa.Table) -> Path:
    """Write a step's rows atomically, replacing earlier ones of that step, and return the file."""
    path = ledger_path(folder, step)
    write_table(path, table)
    return path


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    with atomic(path) as draft:
        pq.write_table(table, draft, compression="zstd")


def read_ledger(folder: Path, steps: Sequence[int] | None = None) -> pa.Table:
    """Read the rows of some steps (by default all) into one table; columns that a step lacks are null.

    Raises:
        FileNotFoundError: naming the missing step, or the folder if it has no steps.
    """
    paths = (
        sorted(folder.glob("step-*.parquet")) if steps is None else [ledger_path(folder, s) for s in steps]
    )
    if not paths:
        raise FileNotFoundError(f"{folder} holds no ledger of any step")
    tables = [pq.read_table(path) for path in paths]
    return pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()
