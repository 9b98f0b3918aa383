"""The live view of runs that are in progress, ended, failed or silent, also at a URL."""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from rich.console import Console

from cluster.record.events import note, recording, warn
from cluster.watch import __main__ as command
from cluster.watch.__main__ import main, show
from cluster.watch.follower import Follower, Lines
from cluster.watch.view import sparkline, view

Capture = pytest.CaptureFixture[str]


def row(step: int, **more: Any) -> dict[str, Any]:
    seconds = {"sample": 1.0, "score": 0.5, "select": 0.0, "learn": 2.0, "broadcast": 0.5}
    return {
        "step": step, "reward_mean": step / 10, "margin_mean": 0.5, "staleness": 1, "candidates": 8,
        "valid": 7, "skipped_updates": 0, "seconds_step": 4.0,
        **{f"seconds_{k}": v for k, v in seconds.items()}, **more,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 20 steps that has done four."""
    folder = tmp_path / "shapes-1"
    folder.mkdir()
    (folder / "config.toml").write_text("steps = 20\n")
    add(folder, {"step": 0, "eval_reward": 0.25}, *(row(step) for step in range(1, 5)))
    return folder


def add(folder: Path, *lines: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def text(folder: Path | str) -> str:
    console = Console(file=io.StringIO(), width=140)
    show(Follower(str(folder)), console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_run_that_goes_on(run: Path) -> None:
    with recording(run, "shapes-1"):
        warn("actor replaced", worker="rollout-1", reason="ActorDiedError: gone")
        note("checkpoint committed", checkpoint=4)
        shown = text(run)
    assert "shapes-1  running" in shown
    assert "step 4/20" in shown
    assert "1 min 04 s left" in shown  # 16 steps of 4 s
    assert re.search(r"reward\s+▁▃▆█\s+0.100 to 0.400", shown)
    assert re.search(r"held-out\s+▁\s+0.250 to 0.250", shown)
    assert re.search(r"mean\s+1.000\s+0.500\s+0.000\s+2.000\s+0.500\s+4.000", shown)
    assert re.search(r"share\s+25%\s+12%\s+0%\s+50%\s+12%", shown)
    assert "staleness 1   starts 1   actors replaced 1   calls failed 0   rewards missing 4" in shown
    assert "checkpoint 4" in shown
    assert "actor replaced  worker=rollout-1  reason=ActorDiedError: gone" in shown


def test_how_a_run_ended(run: Path) -> None:
    with recording(run, "shapes-1"):
        pass
    assert "shapes-1  stopped" in text(run)
    with pytest.raises(RuntimeError, match="out of order"), recording(run, "shapes-1"):
        raise RuntimeError("out of order")
    assert "shapes-1  failed" in text(run)
    assert "run failed  reason=RuntimeError: out of order" in text(run)
    with recording(run, "shapes-1"):
        add(run, *(row(step) for step in range(5, 21)))
    assert "shapes-1  finished" in text(run)
    assert " left" not in text(run)


def test_a_run_that_was_resumed_to_go_further(run: Path) -> None:
    with recording(run, "shapes-1", steps=20):
        add(run, *(row(step) for step in range(5, 21)))
    assert "step 20/20" in text(run)
    with recording(run, "shapes-1", steps=30):
        assert "step 20/30" in text(run)


def test_a_run_without_a_sign_of_life(run: Path) -> None:
    with recording(run, "shapes-1"):
        for path in run.iterdir():
            os.utime(path, (time.time() - 3600,) * 2)
        shown = text(run)
    assert "shapes-1  silent" in shown
    assert "last update 1 h 00 min ago" in shown


def test_a_finished_run_of_before_there_were_events(run: Path) -> None:
    add(run, *(row(step) for step in range(5, 21)))
    assert "shapes-1  finished" in text(run)
    assert "no events yet" in text(run)


def test_alarms_and_control_characters(run: Path) -> None:
    add(run, row(5, alarms={"image_jpeg_size": "fell [red] by 40%"}))
    with recording(run, "shapes-1"):
        warn("call failed", reason="\x1b[2Jgone\nand away")
        shown = text(run)
    assert "guard: image_jpeg_size fell [red] by 40% (step 5)" in shown
    assert "\x1b[2J" not in shown
    assert "gone and away" in shown


def test_a_run_that_has_only_begun(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    with recording(run, "shapes-1"):
        assert "step 0/20" in text(run)


def test_a_run_elsewhere(run: Path) -> None:
    elsewhere = fsspec.filesystem("memory")
    elsewhere.put(str(run), "/watched", recursive=True)
    try:
        assert "step 4/20" in text("memory://watched")
    finally:
        elsewhere.rm("/watched", recursive=True)


def test_only_new_lines_are_read_until_the_file_is_written_anew(run: Path) -> None:
    filesystem = fsspec.filesystem("file")
    lines = Lines(filesystem, str(run / "metrics.jsonl"))
    assert [line["step"] for line in lines.look()] == [0, 1, 2, 3, 4]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5}\n{"st')
        file.flush()
        assert [line["step"] for line in lines.look()] == [0, 1, 2, 3, 4, 5]
        file.write('ep": 6}\n')
    assert lines.look()[-1] == {"step": 6}
    (run / "metrics.jsonl").write_text('{"step": 0}\n')  # what a resumed run does
    assert lines.look() == [{"step": 0}]


def test_a_terminal_is_kept_up_to_date_until_the_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    with recording(run, "shapes-1"):
        follower = Follower(str(run))
        looks: list[float] = []

        def later(seconds: float) -> None:
            looks.append(seconds)
            add(run, *(row(step) for step in range(5 * len(looks), 5 * len(looks) + 5)))
            if len(looks) == 3:
                note("run ended")

        monkeypatch.setattr(command.time, "sleep", later)
        show(follower, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert looks == [command.EVERY] * 3
    assert "step 4/20" in shown
    assert "step 9/20" in shown
    assert "step 19/20" in shown


@pytest.mark.parametrize(
    ("values", "bars"),
    [([], ""), ([1.0], "▁"), ([0.0, 1.0], "▁█"), ([0.0, float("nan"), 1.0], "▁ █"), ([0, 0, 7, 7], "▁█")],
)
def test_sparklines(values: list[float], bars: str) -> None:
    assert sparkline(values, width=3 if len(values) < 4 else 2) == bars


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: Capture) -> None:
    def refused(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    assert f"{tmp_path} is not a run folder: it has no config.toml" in refused(str(tmp_path))
    assert "the following arguments are required: RUN" in refused()
    assert "cannot read nonesuch://run" in refused("nonesuch://run")
    (tmp_path / "config.toml").write_text("steps =")
    assert f"{tmp_path}/config.toml: " in refused(str(tmp_path))


def test_the_view_is_made_of_text_alone(run: Path) -> None:
    read: Callable[[], Any] = Follower(str(run)).look
    assert view("[bold]name", read())
    console = Console(file=io.StringIO(), width=100)
    console.print(view("[bold]name", read()))
    assert "[bold]name" in console.file.getvalue()  # type: ignore[attr-defined]
