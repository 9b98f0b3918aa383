"""The run folder and its checkpoints, after kills and rewinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.config.errors import FolderError, UserError
from cluster.config.sources import resolve
from cluster.record.run_folder import RunFolder
from rewards.combine import Scores
from rollout.records import CandidateGroup, Noise, Prompt
from selection.records import Kept


@pytest.fixture
def folder(tmp_path: Path, configure: Any) -> RunFolder:
    made = RunFolder(tmp_path / "deep" / "run")
    made.create(configure(steps=5))
    return made


def scores(*totals: float, strict: bool = False) -> Scores:
    values = np.array(totals, dtype=np.float64)
    strict_values = (values > 0.5).astype(np.float64) if strict else None
    return Scores(
        rewards={"one": values},
        weights={"one": 1.0},
        valid=np.isfinite(values),
        total=values,
        strict=strict_values,
    )


def drawn(count: int) -> list[tuple[Prompt, int, Noise]]:
    return [
        (Prompt(index=i, text=f"prompt {i}"), 0, Noise(initial=2**64 - 1 - i, path=0)) for i in range(count)
    ]


def test_create_writes_a_configuration_that_loads(folder: RunFolder) -> None:
    assert resolve(str(folder.path / "config.toml"), {}).steps == 5


def test_an_empty_folder_may_be_used_and_a_used_one_not(tmp_path: Path, configure: Any) -> None:
    RunFolder(tmp_path / "new").create(configure())
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty").create(configure())
    with pytest.raises(UserError, match="already used; choose another, or continue with --resume"):
        RunFolder(tmp_path / "empty").create(configure())


def test_history_is_what_was_logged(folder: RunFolder) -> None:
    assert folder.history() == []
    folder.log({"step": 1, "loss": 0.5, "reward_mean": float("nan"), "grad_norm": float("inf")})
    folder.log({"step": 2, "loss": None})
    first = {"step": 1, "loss": 0.5, "reward_mean": None, "grad_norm": None}
    assert folder.history() == [first, {"step": 2, "loss": None}]


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """Parse the lines as strictly as readers other than Python's."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_no_file_holds_a_number_that_is_none(folder: RunFolder) -> None:
    """Also not deep inside, nor after a rewind of what an older version wrote."""
    folder.log({"step": 1, "nested": {"ratios": [float("nan"), (float("-inf"), 0.5)]}})
    prompt, _, noise = drawn(1)[0]
    group = CandidateGroup(
        group_id=7, prompt=prompt, version=0, noises=(noise,), images=(), conditioning=None,
        trajectories=(), seconds=0.0,
    )  # fmt: skip
    folder.record_nonfinite(1, [group], [Kept(group_id=7, candidate=0, advantage=float("inf"))])
    (line,) = strict_lines(folder.metrics)
    assert line["nested"] == {"ratios": [None, [None, 0.5]]}
    ((found,),) = [line["trajectories"] for line in strict_lines(folder.nonfinite)]
    assert (found["advantage"], found["initial"]) == (None, 2**64 - 1)
    with folder.nonfinite.open("a") as file:
        file.write('{"step": 2, "trajectories": [{"advantage": NaN}]}\n')
    folder.rewind(2)
    assert strict_lines(folder.nonfinite)[1] == {"step": 2, "trajectories": [{"advantage": None}]}


def test_a_line_that_a_kill_cut_short_is_left_out(folder: RunFolder) -> None:
    folder.log({"step": 1})
    with folder.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    assert folder.history() == [{"step": 1}]
    folder.rewind(1)
    folder.log({"step": 2})
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2]


def test_rewind_forgets_what_came_after(folder: RunFolder) -> None:
    for step in range(5):
        folder.log({"step": step})
        for part in (folder.ledger, folder.eval):
            part.mkdir(exist_ok=True)
            (part / f"step-{step:06d}.parquet").touch()
    folder.rewind(2)
    assert [line["step"] for line in folder.history()] == [0, 1, 2]
    for part in (folder.ledger, folder.eval):
        assert sorted(path.stem for path in part.iterdir()) == [f"step-{step:06d}" for step in range(3)]
    folder.rewind(2)
    assert len(folder.history()) == 3


def test_rewind_of_a_folder_without_history(folder: RunFolder) -> None:
    folder.rewind(3)
    assert folder.history() == []


def test_an_evaluation_keeps_missing_rewards_missing(folder: RunFolder) -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    folder.save_evaluation(20, drawn(3), scores(0.25, np.nan, 1.0, strict=True), images)
    rows = pq.read_table(folder.eval / "step-000020.parquet").to_pylist()
    assert [row["reward"] for row in rows] == [row["reward_one"] for row in rows] == [0.25, None, 1.0]
    assert [row["strict"] for row in rows] == [0.0, 0.0, 1.0]
    assert [row["noise_seed"] for row in rows] == [2**64 - 1, 2**64 - 2, 2**64 - 3]
    assert [row["prompt"] for row in rows] == ["prompt 0", "prompt 1", "prompt 2"]
    shown = sorted((folder.images / "eval-000020").iterdir())
    assert [path.name for path in shown] == ["p000-s0.png", "p001-s0.png"]
    assert (np.asarray(Image.open(shown[1])) == images[1]).all()
    assert [path.name for path in folder.eval.iterdir()] == ["step-000020.parquet"]


def test_an_evaluation_without_a_verdict_has_none(folder: RunFolder) -> None:
    folder.save_evaluation(0, drawn(1), scores(0.25), np.zeros((1, 4, 4, 3), dtype=np.uint8))
    assert pq.read_table(folder.eval / "step-000000.parquet")["strict"].to_pylist() == [None]


def test_pairs_are_named_after_their_rows_of_the_ledger(folder: RunFolder) -> None:
    images = np.stack([np.full((4, 4, 3), value, dtype=np.uint8) for value in range(20)])
    folder.save_pair(7, 12, images, (3, 17))
    shown = sorted((folder.images / "step-000007").iterdir())
    assert [path.name for path in shown] == ["g000012-c03.png", "g000012-c17.png"]
    assert np.asarray(Image.open(shown[1])).max() == 17


def test_a_full_disk_is_said_in_one_line(folder: RunFolder) -> None:
    folder.metrics = Path("/dev/full")
    with pytest.raises(FolderError, match=r"No space left on device.*--resume continues") as caught:
        folder.log({"step": 1})
    assert "\n" not in str(caught.value)
