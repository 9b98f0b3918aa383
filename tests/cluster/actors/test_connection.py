"""Addresses without a cluster: one line within ten seconds that names the address."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from cluster.actors.connection import check_answers, connect
from cluster.config import model_check
from cluster.config.address import JOB_VARIABLE
from cluster.config.errors import UserError
from cluster.config.settings import ClusterSettings
from cluster.submit.upload import reach
from cluster.train import main

Capture = pytest.CaptureFixture[str]
NOBODY = "127.0.0.1:1"
LIMIT = 10.0


@pytest.fixture
def silent() -> Iterator[str]:
    """A port that accepts connections and sends nothing."""
    with socket.socket() as server:
        server.bind(("", 0))  # Ray takes the address of the node for loopback
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def website() -> Iterator[str]:
    """A port of another service, such as a dashboard."""
    with ThreadingHTTPServer(("", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def refused(address: str, says: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError) as found:
        connect(ClusterSettings(address=address))
    assert time.monotonic() - started < LIMIT
    story = str(found.value)
    assert story.startswith(f"cluster.address: cannot reach Ray at {address}: "), story
    assert says in story
    assert "\n" not in story
    assert not ray.is_initialized()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_is_there(scheme: str) -> None:
    refused(f"{scheme}{NOBODY}", "Connection refused")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_somebody_is_there_and_says_nothing(scheme: str, silent: str) -> None:
    refused(f"{scheme}{silent}", "no answer in 4 s")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_somebody_else_is_there(scheme: str, website: str) -> None:
    refused(f"{scheme}{website}", "HTTP/2")


@pytest.mark.parametrize("address", ["nonsense", "ray://no-port"])
def test_what_is_no_address(address: str) -> None:
    refused(address, "")


def test_the_command_line_says_it_in_one_line_and_leaves_no_folder(
    model_folder: Path, tmp_path: Path, capfd: Capture
) -> None:
    folder = tmp_path / "run"
    flags = ["--model.path", str(model_folder), "--folder", str(folder), "--cluster.address", NOBODY]
    assert main(["shapes", *flags]) == 2
    said = capfd.readouterr()
    assert len(said.err.splitlines()) == 1
    assert f"cluster.address: cannot reach Ray at {NOBODY}: " in said.err
    assert "checkpoint" not in said.out
    assert not folder.exists()


def test_the_address_is_asked_before_the_model_and_by_no_dry_run(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        return '{"refused": "no such model"}'

    monkeypatch.setattr(model_check, "_ask", ask)
    flags = ["shapes", "--model.path", str(model_folder), "--cluster.address", NOBODY]
    assert main(flags) == 2
    assert f"cluster.address: cannot reach Ray at {NOBODY}: " in capfd.readouterr().err
    assert not asked
    assert main([*flags, "--dry-run"]) == 2
    assert capfd.readouterr().err == "error: no such model\n"
    assert asked


def test_an_address_of_the_environment_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", NOBODY)
    with pytest.raises(UserError, match=rf"^RAY_ADDRESS: cannot reach Ray at {NOBODY}: "):
        connect(ClusterSettings())
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    monkeypatch.setattr("cluster.actors.connection.check_answers", lambda address: 1 / 0)
    with pytest.raises(UserError, match=r"^the job's cluster: cannot reach Ray at auto: "):
        connect(ClusterSettings())


def test_a_dashboard_that_says_nothing_is_given_up_as_soon(silent: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray dashboard answers at http://{silent}: timed out"):
        reach(f"http://{silent}", print)
    assert time.monotonic() - started < LIMIT


@pytest.mark.ray
@pytest.mark.usefixtures("node")
def test_a_head_answers_and_is_no_client_server() -> None:
    head = ray.get_runtime_context().gcs_address
    check_answers(head)
    with pytest.raises(ConnectionError, match=r"another service answers there; a head is at HOST:6379"):
        check_answers(f"ray://{head}")
