"""Tests of the ledger: one row per candidate, written atomically and read back unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rewards.combine import Scores
from rollout.records import CandidateGroup, Noise, Prompt
from selection.ledger import ledger_path, ledger_schema, ledger_table, read_ledger, write_ledger
from selection.selector import Selector
from selection.settings import SelectionSettings


def group_of(group_id: int, size: int = 4) -> CandidateGroup:
    return CandidateGroup(
        group_id=group_id,
        prompt=Prompt(index=7, text="a red circle"),
        version=3,
        noises=tuple(Noise(initial=2**64 - 1 - i, path=100 + i) for i in range(size)),
        images=(),
        conditioning=None,
        trajectories=(None,) * size,
        seconds=2.0,
    )


def scores_of(*totals: float, name: str = "shapes") -> Scores:
    total = np.array(totals)
    return Scores(
        rewards={name: total}, weights={name: 1.0}, valid=np.isfinite(total), total=total, strict=None
    )


def table_of(step: int, *, name: str = "shapes") -> pa.Table:
    groups = [group_of(10), group_of(11)]
    scores = [scores_of(0, 1, 3, np.nan, name=name), scores_of(1, 1, 1, 1, name=name)]
    selection = Selector(SelectionSettings(keep=2), 0).select(step, [10, 11], scores)
    return ledger_table(step, groups, scores, selection)


def test_one_row_per_candidate() -> None:
    rows = table_of(5).to_pylist()
    assert len(rows) == 8
    assert rows[0] == {
        "step": 5,
        "group": 10,
        "candidate": 0,
        "prompt_index": 7,
        "prompt": "a red circle",
        "noise_seed": 2**64 - 1,
        "path_seed": 100,
        "policy_version": 3,
        "reward": 0.0,
        "reward_shapes": 0.0,
        "valid": True,
        "selected": True,
        "advantage": rows[0]["advantage"],
        "seconds": 0.5,
    }
    assert rows[0]["advantage"] == -rows[2]["advantage"] < 0
    assert [row["selected"] for row in rows] == [True, False, True] + [False] * 5
    assert rows[1]["advantage"] is None
    assert rows[3]["reward"] is rows[3]["reward_shapes"] is None
    assert not rows[3]["valid"]


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    for step in (12, 3):
        assert write_ledger(folder, step, table_of(step)) == ledger_path(folder, step)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003.parquet", "step-000012.parquet"]
    assert read_ledger(folder, [12]).to_pylist() == table_of(12).to_pylist()
    whole = read_ledger(folder)
    assert whole.column("step").to_pylist() == [3] * 8 + [12] * 8
    assert whole.schema.equals(ledger_schema(["shapes"]))


def test_a_step_written_again_replaces_the_first(tmp_path: Path) -> None:
    write_ledger(tmp_path, 3, table_of(3).slice(0, 2))
    write_ledger(tmp_path, 3, table_of(3))
    assert read_ledger(tmp_path).num_rows == 8


def test_a_reward_that_a_step_lacks_is_null(tmp_path: Path) -> None:
    write_ledger(tmp_path, 1, table_of(1))
    write_ledger(tmp_path, 2, table_of(2, name="words"))
    rows = read_ledger(tmp_path).to_pylist()
    assert rows[0]["reward_words"] is None
    assert rows[8]["reward_shapes"] is None
    assert rows[8]["reward_words"] == 0.0


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no ledger"):
        read_ledger(tmp_path)
    with pytest.raises(FileNotFoundError, match="step-000004"):
        read_ledger(tmp_path, [4])


def test_scores_must_fit_the_candidates() -> None:
    scores = [scores_of(0, 1)]
    selection = Selector(SelectionSettings(keep=2), 0).select(0, [10], scores)
    with pytest.raises(ValueError, match="group 10 has 4 candidates, but 2 scores"):
        ledger_table(0, [group_of(10)], scores, selection)
