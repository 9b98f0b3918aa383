"""JSON lines that are cut off or damaged, and files that are written atomically."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.record.json_lines import complete_lines, metric_lines
from rollout.files import atomic


def test_a_line_that_is_cut_short_is_left_for_later() -> None:
    whole = b'{"step": 0}\n{"step": 1}\n'
    assert complete_lines(whole + b'{"ste') == ([{"step": 0}, {"step": 1}], len(whole))
    assert complete_lines(b'{"step": 0}') == ([], 0)
    assert complete_lines(b"") == ([], 0)


def test_a_complete_line_that_is_damaged_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        complete_lines(b'{"step": 0}\n{"step": \n')


def test_damaged_lines_are_numbered_and_a_last_line_needs_no_newline() -> None:
    content = b'{"step": 0}\n\n[1]\n{"step": "1"}\n\xff{\n{"step": 2}'
    assert metric_lines(content) == ([{"step": 0}, {"step": 2}], [3, 4, 5])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with atomic(path) as draft:
        draft.write_text("old")
    with pytest.raises(TypeError), atomic(path) as draft:
        draft.write_text(b"not text")  # type: ignore[arg-type]
    assert path.read_text() == "old"
