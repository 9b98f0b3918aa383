"""Object stores larger than shared memory: refused with both sizes and the key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.actors.connection import connect
from cluster.config.errors import UserError
from cluster.config.object_store import ANYWAY, check_object_store
from cluster.config.preflight import check
from cluster.config.settings import ClusterSettings
from cluster.record.events import recording
from cluster.record.names import LOG
from cluster.train import main
from tests.support.run_fixtures import set_shared_memory

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _linux(monkeypatch: Patch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv(ANYWAY, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_plain_container_is_told_how_to_start(
    monkeypatch: Patch, configure: Any, set_free_memory: Any, model_folder: Path, capsys: Capture
) -> None:
    set_free_memory(64)
    set_shared_memory(monkeypatch, free=0.067, total=0.067)
    with pytest.raises(UserError, match="--shm-size=1100m"):
        check(configure())
    assert main(["shapes", "--model.path", str(model_folder), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.splitlines() == [
        "error: cluster.object_store_gb: 1 GB, but /dev/shm has 0.067 GB free of 0.067 GB, so objects would "
        "go through the disk; lower it, start the container with --shm-size=1100m, or set "
        f"{ANYWAY}=1 to run slowly"
    ]


def test_what_others_have_taken_of_shared_memory_is_not_free(monkeypatch: Patch) -> None:
    set_shared_memory(monkeypatch, free=8, total=16)
    assert not check_object_store(8)
    with pytest.raises(UserError, match=r"12 GB, but /dev/shm has 8 GB free of 16 GB.*--shm-size=13200m"):
        check_object_store(12)


def test_connecting_refuses_it_too_for_who_skips_the_preflight(monkeypatch: Patch) -> None:
    set_shared_memory(monkeypatch, free=0.067)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
    for address in (None, "local"):
        with pytest.raises(UserError, match=r"^cluster\.object_store_gb: 1 GB"):
            connect(ClusterSettings(address=address))


def test_a_user_may_put_up_with_the_disk_and_is_told(
    monkeypatch: Patch, configure: Any, set_free_memory: Any, tmp_path: Path
) -> None:
    set_free_memory(64)
    set_shared_memory(monkeypatch, free=0.067)
    monkeypatch.setenv(ANYWAY, "1")
    remark = check_object_store(1)
    assert remark.startswith("1 GB, but /dev/shm has 0.067 GB free")
    assert check(configure()).remarks == (f"cluster.object_store_gb: {remark}",)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    with recording(tmp_path, "run"):
        connect(ClusterSettings(object_store_gb=1))
    events = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert (events[1]["event"], events[1]["reason"]) == ("object store on disk", remark)


def test_shared_memory_of_another_machine_is_not_ours_to_judge(
    monkeypatch: Patch, configure: Any, set_free_memory: Any
) -> None:
    set_free_memory(0.01)
    assert check(configure(cluster={"address": "ray://somewhere:10001"})).train
    monkeypatch.setattr("sys.platform", "darwin")
    assert not check_object_store(1)


def test_a_machine_without_shared_memory_is_an_error_of_one_line(monkeypatch: Patch) -> None:
    def fail(path: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    with pytest.raises(UserError, match=r"Ray needs /dev/shm: No such file"):
        check_object_store(1)


def test_less_than_ray_takes_is_refused_by_its_own_name() -> None:
    with pytest.raises(ValueError, match="object_store_gb"):
        ClusterSettings(object_store_gb=0.05)


@pytest.mark.ray
def test_what_ray_says_of_the_store_comes_under_the_stores_name(monkeypatch: Patch) -> None:
    set_shared_memory(monkeypatch, free=10**6)
    with pytest.raises(UserError, match=r"^cluster\.object_store_gb: cannot start .* object store"):
        connect(ClusterSettings(object_store_gb=10**5))
