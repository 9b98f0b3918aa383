"""Damaged checkpoints: detected by a single bit, skipped with a message, kept, and not counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest

from cluster.config.errors import UserError
from cluster.loop.resume import report_losses, resumable, started_before
from cluster.record.checkpoints import Checkpoints
from cluster.record.events import recording
from cluster.record.names import LOG, MARKER
from cluster.record.run_folder import RunFolder
from cluster.record.stored_checkpoints import DamagedError
from tests.support.saving import FILES, SavingLearner, commit, flip

Resume = Callable[[Any, RunFolder, Checkpoints], Any]


@pytest.fixture(params=["folder", "url"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder of this machine, or a store that only fsspec reaches."""
    if request.param == "folder":
        yield str(tmp_path / "checkpoints")
        return
    yield f"memory://{uuid4()}/checkpoints"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def folder(tmp_path: Path, configure: Any) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create(configure())
    for step in range(9):
        made.log({"step": step})
    return made


@pytest.fixture
def saved(root: str, folder: RunFolder, configure: Any) -> Checkpoints:
    """Two checkpoints of a run, after steps 4 and 8, opened as by another process."""
    settings = configure().model_dump(mode="json")
    commit(Checkpoints(root, 2, settings, folder), 4, 8)
    return Checkpoints(root, 2, settings, folder)


@pytest.mark.parametrize("name", [*FILES, "run/metrics.jsonl", MARKER])
def test_one_flipped_bit_of_any_file_is_noticed(saved: Checkpoints, name: str) -> None:
    flip(saved, 8, name)
    found = saved.newest()
    assert found is not None
    assert found.step == 4
    assert f"step-8/{name}" in saved.damaged[8]
    assert saved.steps() == [4]


@pytest.mark.parametrize("bit", range(0, 8 * 200, 37))
def test_a_flipped_bit_of_a_marker_never_makes_another_one(
    tmp_path: Path, folder: RunFolder, bit: int
) -> None:
    saved = Checkpoints(str(tmp_path / "checkpoints"), 2, {"seed": 3}, folder)
    commit(saved, 4)
    flip(saved, 4, MARKER, bit)
    with pytest.raises(DamagedError, match="is not a checkpoint marker"):
        saved.read(4)


def test_whole_checkpoints_are_as_they_were(saved: Checkpoints) -> None:
    found = saved.newest()
    assert found is not None
    assert (found.step, saved.damaged) == (8, {})
    assert all(len(entry.crc32 or "") == 8 for entry in found.files.values())


@pytest.mark.parametrize("resume", [resumable, started_before])
def test_a_run_resumes_from_the_one_before_and_says_so(
    saved: Checkpoints, folder: RunFolder, configure: Any, resume: Resume
) -> None:
    flip(saved, 8, "weights")
    found = resume(configure(), folder, saved)
    assert found.step == 4
    assert [line["step"] for line in folder.history()] == [0, 1, 2, 3, 4]
    told: list[str] = []
    with recording(folder.path, "run"):
        for _ in range(2):
            report_losses(found, folder, saved, told.append)
    (line,) = [line for line in told if "damaged" in line]
    assert line.startswith("damaged, so an older checkpoint is used: ")
    assert "step-8/weights has the CRC-32 " in line
    events = [json.loads(line) for line in (folder.path / LOG).read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "checkpoint damaged"]
    assert (event["level"], event["checkpoint"]) == ("warning", 8)
    assert "step-8/weights" in event["reason"]


@pytest.mark.parametrize("resume", [resumable, started_before])
def test_a_run_whose_checkpoints_are_all_damaged_is_refused(
    saved: Checkpoints, folder: RunFolder, configure: Any, resume: Resume
) -> None:
    flip(saved, 8, "weights")
    saved.filesystem.rm_file(f"{saved.root}/step-4/engine/rank-0")
    with pytest.raises(UserError, match=r"every checkpoint is damaged: .*step-8/weights.*; .*step-4/engine"):
        resume(configure(), folder, saved)
    assert len(folder.history()) == 9


def test_a_damaged_checkpoint_is_kept_and_not_counted(saved: Checkpoints) -> None:
    flip(saved, 8, "weights")
    assert saved.newest() is not None
    commit(saved, 6)
    assert saved.steps() == [4, 6]
    commit(saved, 9)
    assert saved.steps() == [6, 9]
    assert saved.filesystem.exists(f"{saved.root}/step-8/weights")
    assert not saved.filesystem.exists(f"{saved.root}/step-4")


def test_a_checkpoint_that_somebody_set_aside_is_left_alone(saved: Checkpoints) -> None:
    saved.filesystem.mv(f"{saved.root}/step-8", f"{saved.root}/step-8.bad", recursive=True)
    found = saved.newest()
    assert found is not None
    assert (found.step, saved.steps()) == (4, [4])


def test_a_step_that_is_made_again_gets_a_whole_checkpoint(saved: Checkpoints) -> None:
    flip(saved, 8, "weights")
    assert saved.newest() is not None
    commit(saved, 8)
    found = saved.newest()
    assert found is not None
    assert (found.step, saved.steps()) == (8, [4, 8])


def old_marker(saved: Checkpoints, step: int, *without: str) -> None:
    """Write a marker as the first version did: sizes alone, no digest of its own."""
    path = f"{saved.root}/step-{step}/{MARKER}"
    said = json.loads(saved.filesystem.cat_file(path))
    del said["crc32"]
    said["files"] = {n: e["size"] for n, e in said["files"].items() if not n.startswith("run/")}
    for key in without:
        del said["settings"][key]
    saved.filesystem.pipe_file(path, json.dumps(said).encode())


def test_an_older_versions_checkpoint_is_judged_by_sizes(
    saved: Checkpoints, folder: RunFolder, configure: Any
) -> None:
    old_marker(saved, 8, "guard", "max_staleness")
    found = resumable(configure(), folder, saved)
    assert (found.step, saved.damaged) == (8, {})
    assert [line["step"] for line in folder.history()] == list(range(9))
    saved.filesystem.pipe_file(f"{saved.root}/step-8/weights", b"cut")
    assert resumable(configure(), folder, saved).step == 4
    assert "step-8/weights has 3 bytes, expected 12" in saved.damaged[8]


def test_a_key_that_an_older_version_did_not_have_counts_as_its_default(
    saved: Checkpoints, folder: RunFolder, configure: Any
) -> None:
    old_marker(saved, 8, "max_staleness")
    with pytest.raises(UserError, match="max_staleness: 0 -> 1"):
        resumable(configure(max_staleness=1), folder, saved)


def test_another_configuration_is_refused_before_files_are_read(
    saved: Checkpoints, folder: RunFolder, configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "verify", lambda *arguments: pytest.fail("files were read"))
    with pytest.raises(UserError, match="seed: 0 -> 7"):
        resumable(configure(seed=7), folder, saved)


def test_a_damaged_file_is_not_handed_out(saved: Checkpoints) -> None:
    flip(saved, 8, "weights")
    with pytest.raises(DamagedError, match="step-8/weights has the CRC-32"):
        saved.file(8, "weights")
    assert saved.file(8, "engine/rank-0").read_bytes() == FILES["engine/rank-0"]


def test_a_file_that_cannot_be_read_is_damaged(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = type(saved.filesystem).open

    def bad_disk(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith("step-8/weights"):
            raise OSError(5, "Input/output error")
        return opened(self, path, *arguments, **options)

    monkeypatch.setattr(type(saved.filesystem), "open", bad_disk)
    found = saved.newest()
    assert found is not None
    assert found.step == 4
    assert saved.damaged[8].endswith("step-8/weights cannot be read: [Errno 5] Input/output error")


def test_what_is_loaded_is_what_was_verified(saved: Checkpoints) -> None:
    flip(saved, 8, "weights")
    found, learner = saved.newest(), SavingLearner()
    assert found is not None
    asyncio.run(saved.restore(found.step, learner))  # type: ignore[arg-type]
    assert learner.restored.endswith("step-4")
