"""Warnings of libraries in actors: each is logged and printed once, and nothing else is."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from cluster.actors import library_warnings
from cluster.actors.actor_spec import ActorSpec
from cluster.actors.library_warnings import LIMIT, LONGEST, LibraryWarnings, forward
from cluster.actors.pool import Pool, call
from cluster.record.events import recording
from cluster.record.names import LOG


class Store(dict[str, str]):
    """Ray's key-value store, as far as it is used."""

    def put(self, key: str, value: str, *, overwrite: bool, namespace: str) -> None:
        assert not overwrite
        self.setdefault(key, value)

    @property
    def texts(self) -> list[str]:
        return [json.loads(value)["text"] for value in self.values()]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Forward this process's warnings into a store of its own."""
    found, factory = Store(), logging.getLogRecordFactory()
    monkeypatch.setattr(library_warnings, "_internal_kv_put", found.put)
    monkeypatch.setattr(library_warnings, "_prefix", lambda: "")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *_: None)
        forward("learner-0")
        yield found
    logging.setLogRecordFactory(factory)


def test_a_logger_without_handlers_and_a_warning_are_both_passed_on(store: Store) -> None:
    quiet = logging.getLogger("somelib.deep.inside")
    quiet.propagate = False
    quiet.warning("%d weights\n are  newly initialised", 7)
    warnings.warn("the clock is wrong", RuntimeWarning, stacklevel=1)
    first, second = (json.loads(value) for value in store.values())
    assert first == {
        "library": "somelib", "text": "7 weights are newly initialised", "worker": "learner-0",
    }  # fmt: skip
    assert second["text"] == "RuntimeWarning: the clock is wrong"


def test_a_text_is_passed_on_once_and_not_without_bound(store: Store) -> None:
    logger = logging.getLogger("somelib")
    for number in (1, 1, 1):
        logger.warning("step %d", number)
    assert store.texts == ["step 1"]
    for number in range(3 * LIMIT):
        logger.warning("step %d", number)
    assert len(store) == LIMIT + 1
    assert store.texts[-1].startswith(f"more than {LIMIT} different warnings")
    assert len(store.texts[0]) < LONGEST


def test_what_is_no_warning_or_known_is_not_passed_on(store: Store) -> None:
    logging.getLogger("somelib").info("loaded")
    logging.getLogger("DeepSpeed").warning("**** You are using ZeRO with an untested optimizer, proceed ****")
    warnings.warn("gone in version 9", FutureWarning, stacklevel=1)
    warnings.warn("gone in version 9", DeprecationWarning, stacklevel=1)
    assert not store


def test_a_broken_log_call_of_a_library_does_no_harm(store: Store) -> None:
    logger = logging.getLogger("somelib")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    logger.warning("%d weights", "no number")
    assert store.texts == ["%d weights"]


def test_a_forked_process_leaves_the_connection_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    logging.getLogger("somelib").warning("in a child")
    assert not store


@pytest.mark.parametrize(
    ("filename", "package"),
    [
        ("/env/lib/python3.11/site-packages/torch/nn/modules/module.py", "torch"),
        ("/usr/lib/python3/dist-packages/six.py", "six"),
        ("/repo/learner/engine.py", "learner"),
        ("<string>", "<string>"),
    ],
)
def test_a_warning_is_of_the_package_of_its_file(filename: str, package: str) -> None:
    assert library_warnings._package(filename) == package


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [line for line in lines if line["event"] == "library warning"]


@pytest.mark.ray
@pytest.mark.usefixtures("node")
def test_actors_are_heard_once_also_one_that_died(tmp_path: Path) -> None:
    said: list[str] = []
    heard = LibraryWarnings(said.append)
    pool = Pool(ActorSpec(name="rollout", target="tests.support.workers:Warner"), 2, 60)

    async def work() -> None:
        await pool.ready()
        for slot in pool.slots:
            await call(slot, "warn", "%d keys are missing", 3, deadline=60)
            await call(slot, "murmur", deadline=60)
        heard.collect()
        heard.collect()
        with pytest.raises(ActorDiedError):
            await call(pool.slots[1], "warn_and_die", "out of memory soon", deadline=60)
        heard.log({})

    with recording(tmp_path, "run"):
        asyncio.run(work())
    texts = [line["text"] for line in logged(tmp_path)]
    assert sorted(texts[:2]) == ["3 keys are missing", "UserWarning: made with random weights"]
    assert texts[2:] == ["out of memory soon"]
    assert logged(tmp_path)[2]["worker"] == "rollout-1"
    assert "somelib warns in rollout-1: out of memory soon" in said
    assert len(said) == 3
