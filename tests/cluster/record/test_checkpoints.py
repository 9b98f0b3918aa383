"""Checkpoints in folders and at URLs: committed atomically, and only for the same run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest

from cluster.config.errors import UserError
from cluster.loop.resume import changed_packages, resumable
from cluster.record import marker
from cluster.record.checkpoints import Checkpoints
from cluster.record.marker import OWN, installed
from cluster.record.names import MARKER
from cluster.record.run_folder import RunFolder
from learner.records import Written
from tests.support.saving import written_at


class StandIn:
    """A learner that saves a file per rank, and may fail half-way or upload slowly."""

    def __init__(self) -> None:
        self.restored = ""
        self.fails = self.slow = False

    async def save(self, url: str) -> None:
        self.url = url
        filesystem, path = fsspec.core.url_to_fs(url)
        assert "://" in url
        assert not filesystem.exists(f"{path}/{MARKER}")
        filesystem.makedirs(f"{path}/engine", exist_ok=True)
        filesystem.pipe_file(f"{path}/engine/rank-0", b"state")
        if self.fails:
            raise RuntimeError("the disk is full")
        filesystem.pipe_file(f"{path}/rank-1", b"more state")

    async def saved(self, *, wait: bool) -> list[Written] | None:
        return written_at(self.url) if wait or not self.slow else None

    async def restore(self, url: str) -> None:
        self.restored = url


@pytest.fixture(params=["folder", "url"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder of this machine, or a store that only fsspec reaches."""
    if request.param == "folder":
        yield str(tmp_path / "checkpoints")
        return
    name = f"memory://{uuid4()}/checkpoints"
    yield name
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def checkpoints(root: str) -> Checkpoints:
    return Checkpoints(root, keep=2)


@pytest.fixture
def learner() -> Any:
    return StandIn()


def commit(checkpoints: Checkpoints, learner: Any, *steps: int) -> None:
    async def all_of_them() -> None:
        for step in steps:
            await checkpoints.commit(step, learner)
            await checkpoints.settle(learner, wait=True)

    asyncio.run(all_of_them())


def files(checkpoints: Checkpoints, step: int) -> list[str]:
    found = checkpoints.filesystem.find(f"{checkpoints.root}/step-{step}")
    return sorted(path.partition(f"step-{step}/")[2] for path in found)


def test_a_checkpoint_is_marked_when_everything_is_written(checkpoints: Checkpoints, learner: Any) -> None:
    commit(checkpoints, learner, 3)
    assert files(checkpoints, 3) == [MARKER, "engine/rank-0", "rank-1"]
    assert checkpoints.steps() == [3]
    sizes = {name: entry.size for name, entry in checkpoints.read(3).files.items()}
    assert sizes == {"engine/rank-0": 5, "rank-1": 10}


def test_only_the_newest_checkpoints_are_kept(checkpoints: Checkpoints, learner: Any) -> None:
    commit(checkpoints, learner, 2, 9, 10, 11)
    assert checkpoints.steps() == [10, 11]
    assert files(checkpoints, 9) == []


def test_the_best_one_is_kept_besides(root: str, learner: Any, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "record")
    folder.path.mkdir()
    scores: dict[int, float | None] = {2: 0.4, 4: 0.9, 5: 1.0, 6: 0.9, 8: None, 10: 0.7}
    lines = [{"step": step, "eval_reward": score} for step, score in scores.items()]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = Checkpoints(root, keep=1, record=folder, best_by="eval_reward")
    commit(kept, learner, 2)
    assert kept.best() == 2
    commit(kept, learner, 4, 6, 8, 10)  # step 5 was evaluated, and not saved
    assert kept.steps() == [6, 10]  # the newer of equals
    assert kept.best() == 6
    other = Checkpoints(root, keep=1, record=folder, best_by="eval_strict")
    assert other.best() is None
    commit(other, learner, 12)
    assert other.steps() == [12]


def test_a_failed_checkpoint_is_none_and_the_older_ones_stay(checkpoints: Checkpoints, learner: Any) -> None:
    commit(checkpoints, learner, 1, 2)
    learner.fails = True
    with pytest.raises(RuntimeError, match="disk is full"):
        commit(checkpoints, learner, 3)
    assert files(checkpoints, 3) == ["engine/rank-0"]
    assert checkpoints.steps() == [1, 2]
    learner.fails = False
    commit(checkpoints, learner, 3)
    assert checkpoints.steps() == [2, 3]


def test_what_is_still_under_way_is_not_committed(checkpoints: Checkpoints, learner: Any) -> None:
    async def scenario() -> None:
        learner.slow = True
        await checkpoints.commit(4, learner)
        await checkpoints.settle(learner, wait=False)
        assert checkpoints.steps() == []
        learner.slow = False
        await checkpoints.settle(learner, wait=False)
        assert checkpoints.steps() == [4]
        learner.slow = True
        await checkpoints.commit(5, learner)
        await checkpoints.commit(6, learner)  # the next one waits for the one before
        assert checkpoints.steps() == [4, 5]

    asyncio.run(scenario())


def test_a_file_of_a_checkpoint_can_be_read_from_anywhere(checkpoints: Checkpoints, learner: Any) -> None:
    commit(checkpoints, learner, 4)
    assert checkpoints.file(4, "rank-1").read_bytes() == b"more state"
    with pytest.raises(FileNotFoundError, match="rank-7"):
        checkpoints.file(4, "rank-7")


@pytest.mark.parametrize(("name", "content"), [("rank-1", b"more sta"), ("rank-1", None), (MARKER, b"{}")])
def test_a_damaged_checkpoint_is_named_and_not_loaded(
    checkpoints: Checkpoints, learner: Any, name: str, content: bytes | None
) -> None:
    commit(checkpoints, learner, 4)
    path = f"{checkpoints.root}/step-4/{name}"
    checkpoints.filesystem.rm_file(path)
    if content is not None:
        checkpoints.filesystem.pipe_file(path, content)
    with pytest.raises(UserError, match=name):
        checkpoints.read(4)


def test_no_folder_means_no_checkpoints(checkpoints: Checkpoints) -> None:
    assert checkpoints.steps() == []


@pytest.fixture
def resume(tmp_path: Path, configure: Any, learner: Any) -> Any:
    """Commit step 4 of a run, change its configuration, and try to resume it."""
    before = configure()
    folder = RunFolder(tmp_path / "a run")
    folder.create(before)
    commit(Checkpoints(str(folder.checkpoints), 2, before.model_dump(mode="json")), learner, 4)

    def attempt(**overrides: Any) -> Any:
        after = configure(**overrides)
        return resumable(after, folder, Checkpoints(str(folder.checkpoints), 2, {}))

    return attempt


def test_the_same_configuration_resumes(resume: Any) -> None:
    found = resume()
    assert (found.step, found.empty_batches) == (4, 0)
    assert changed_packages(found) == ""


@pytest.mark.parametrize(
    "overrides",
    [
        {"steps": 50, "checkpoint_every": 7, "keep_checkpoints": 1},
        {"rollout": {"workers": 5}, "learner": {"ranks": 2, "threads": 3}},
        {"cluster": {"address": "ray://elsewhere:10001"}},
    ],
)
def test_how_long_and_where_a_run_runs_may_change(resume: Any, overrides: dict[str, Any]) -> None:
    assert resume(**overrides).step == 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"seed": 7}, "seed: 0 -> 7"),
        ({"learner": {"learning_rate": 1e-5}}, "learner.learning_rate: 0.0003 -> 1e-05"),
        ({"selection": {"candidates": 32}}, "selection.candidates: 16 -> 32"),
        ({"learner": {"schedule": "cosine"}}, "learner.schedule: 'constant' -> 'cosine'"),
    ],
)
def test_what_would_make_it_another_run_is_refused(resume: Any, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="configuration differs") as caught:
        resume(**overrides)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_a_schedule_that_ends_with_the_run_fixes_its_length(
    tmp_path: Path, configure: Any, learner: Any
) -> None:
    settings = configure(learner={"schedule": "linear"})
    folder = RunFolder(tmp_path / "a run")
    folder.create(settings)
    checkpoints = Checkpoints(str(folder.checkpoints), 2, settings.model_dump(mode="json"))
    commit(checkpoints, learner, 4)
    with pytest.raises(UserError, match=r"steps: \d+ -> 999"):
        resumable(configure(learner={"schedule": "linear"}, steps=999), folder, checkpoints)


def test_a_run_that_has_done_more_than_it_should_is_refused(resume: Any) -> None:
    with pytest.raises(UserError, match="has done 4 steps, more than steps = 3"):
        resume(steps=3)


@pytest.mark.parametrize(
    ("package", "was", "told"),
    [("torch", "1.0", "torch 1.0 -> "), (OWN, "0.0.1", f"{OWN} 0.0.1 -> "), ("forgotten", "1.0", "")],
)
def test_other_packages_are_told(tmp_path: Path, resume: Any, package: str, was: str, told: str) -> None:
    rewrite(tmp_path, {**installed(), package: was})
    changes = changed_packages(resume())
    assert changes.startswith(told) if told else changes == ""


def test_another_commit_is_told_only_where_both_are_known(
    tmp_path: Path, resume: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(tmp_path, {**installed(), f"{OWN} commit": "0000000"})
    monkeypatch.setattr(marker, "commit", lambda: "1111111+")
    assert changed_packages(resume()) == f"{OWN} commit 0000000 -> 1111111+"
    monkeypatch.setattr(marker, "commit", lambda: "")
    assert changed_packages(resume()) == ""
    rewrite(tmp_path, {"torch": installed()["torch"]})  # of a version that did not record itself
    monkeypatch.setattr(marker, "commit", lambda: "1111111+")
    assert changed_packages(resume()) == ""


def rewrite(tmp_path: Path, packages: dict[str, str]) -> None:
    """Rewrite the marker of step 4 with other packages."""
    path = tmp_path / "a run/checkpoints/step-4" / MARKER
    content = json.loads(path.read_text())
    content["packages"] = packages
    content.pop("crc32", None)
    path.write_text(json.dumps(content))
