"""Folders that the ranks' nodes do not share: an error, and no commit of invisible files."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.config.errors import CheckpointError
from cluster.record import checkpoints as module
from cluster.record.checkpoints import Checkpoints
from learner.records import Written
from tests.support.saving import FILES, SavingLearner, commit, digests_of, written_at


class Apart(SavingLearner):
    """Ranks, some of which write to a disk that no other machine sees."""

    def __init__(self, *elsewhere: Written, here: bool = False) -> None:
        super().__init__()
        self.elsewhere, self.here = elsewhere, here

    async def save(self, url: str) -> None:
        self.url = url
        if self.here:
            await super().save(url)

    async def saved(self, *, wait: bool) -> list[Written]:
        return [*(written_at(self.url) if self.here else []), *self.elsewhere]


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    monkeypatch.setattr(module, "VISIBLE_WITHIN", 0.0)
    return Checkpoints(str(tmp_path / "checkpoints"), 2)


def rank(host: str, **contents: bytes) -> Written:
    return Written(host=host, files=digests_of(contents or FILES))


def refusal(checkpoints: Checkpoints, learner: Any, step: int = 3) -> str:
    with pytest.raises(CheckpointError) as caught:
        commit(checkpoints, step, learner=learner)
    assert step not in checkpoints.steps()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_no_rank_shares(checkpoints: Checkpoints) -> None:
    said = refusal(checkpoints, Apart(rank("node-b")))
    assert said == (
        f"checkpoint file://{checkpoints.root}/step-3: node-b has written 2 files of which "
        f"{socket.gethostname()} does not see 2, such as engine/rank-0 (no bytes, expected 7); all nodes "
        "must share this folder: put it on a shared file system, or name a URL with --checkpoints; "
        "there is no older one"
    )


def test_a_folder_that_one_rank_of_two_shares(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 2)
    said = refusal(checkpoints, Apart(rank("node-c", moments=b"of rank 1"), here=True))
    assert "node-c has written 1 files" in said
    assert "does not see 1, such as moments (no bytes, expected 9)" in said
    assert said.endswith("--resume continues from step 2")


def test_a_file_that_is_seen_cut_short(checkpoints: Checkpoints) -> None:
    assert "weights (12 bytes, expected 5)" in refusal(
        checkpoints, Apart(rank("node-d", weights=b"other"), here=True)
    )


@pytest.mark.parametrize("learner", [Apart(), Apart(Written(host="node-b", files={}))])
def test_an_empty_checkpoint_is_none(checkpoints: Checkpoints, learner: Any) -> None:
    assert "no rank has written a file" in refusal(checkpoints, learner)


def test_a_rank_without_files_of_its_own_is_fine(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 3, learner=Apart(Written(host="node-b", files={}), here=True))
    assert checkpoints.steps() == [3]


def test_what_a_file_system_shows_late_is_waited_for(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VISIBLE_WITHIN", 30.0)

    class Late(Apart):
        async def saved(self, *, wait: bool) -> list[Written]:
            asyncio.get_running_loop().call_later(
                0.2, asyncio.ensure_future, SavingLearner.save(self, self.url)
            )
            return list(self.elsewhere)

    async def scenario() -> None:
        learner: Any = Late(rank("node-b"))
        await checkpoints.commit(3, learner)
        await checkpoints.settle(learner, wait=True)

    asyncio.run(scenario())
    assert checkpoints.steps() == [3]
