from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.scorer import RewardError, Unavailable
from rewards.scorers.jpeg import JpegScorer
from rewards.scorers.remote import RemoteScorer
from rewards.scorers.shapes import ShapesScorer
from rewards.worker import RewardWorker
from rollout.prompts import load_prompts
from rollout.records import Prompt
from rollout.tiny.prompt_files import FOLDER
from rollout.tiny.world import draw_scene, scene_for
from tests.support.reward_servers import OWN, ROOT, Server, served

Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "echo_reward.py").write_text(OWN)
    return folder


@pytest.fixture(scope="module")
def echo(own: Path) -> Iterator[Server]:
    with served("echo_reward:Echo", own=own) as server:
        yield server


@pytest.fixture(scope="module")
def jpeg() -> Iterator[Server]:
    with served("jpeg", "--options", "prefer=large") as server:
        yield server


@pytest.fixture(scope="module")
def shapes() -> Iterator[Server]:
    with served("shapes") as server:
        yield server


def noise(count: int = 5, size: int = 24) -> Images:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def prompts(count: int, text: str = "a", **metadata: Any) -> list[Prompt]:
    return [Prompt(index=7 + i, text=text, metadata=metadata) for i in range(count)]


@pytest.mark.parametrize("media_type", ["image/png", "image/webp"])
def test_jpeg_scores_are_equal_to_the_bit(jpeg: Server, media_type: Any) -> None:
    images = noise(21)
    local = JpegScorer(prefer="large")(images, prompts(21))
    remote = RemoteScorer(jpeg.url, batch=4, media_type=media_type)
    judgement = remote(images, prompts(21))
    assert judgement.values.tobytes() == local.values.tobytes()
    assert judgement.values.dtype == np.float64
    assert judgement.valid.all()
    assert (remote.traits.low, remote.traits.high) == (-10.0, 10.0)


def test_500_requests_at_8_at_a_time_score_as_in_process(shapes: Server) -> None:
    lines = load_prompts(FOLDER / "shapes-train.jsonl")
    rng = np.random.default_rng(1)
    asked = [lines[i % len(lines)] for i in range(500)]
    images = np.stack(
        [draw_scene(scene_for(dict(lines[rng.integers(len(lines))].metadata), rng)) for _ in asked]
    )
    remote = RewardWorker("remote", {"url": shapes.url, "batch": 1, "concurrency": 8})
    judgement = remote.score(images, asked)
    local = ShapesScorer()(images, asked)
    assert judgement.values.tobytes() == local.values.tobytes()
    assert judgement.details["strict"].tobytes() == local.details["strict"].tobytes()
    assert judgement.valid.all()
    assert 0.0 < local.values.mean() < 1.0


def test_prompts_and_metadata_arrive_as_they_are(echo: Server) -> None:
    metadata = {
        "float": 0.1 + 0.2,
        "big": 2**80,
        "whole": 1.0,
        "none": None,
        "nested": [{"a": [True, 1, '\u2603 "quoted"']}],
    }
    prompt = Prompt(index=3, text="a \u2028 sign \U0001f600", metadata=metadata, origin="stays here")
    RemoteScorer.check(prompt)
    judgement = RemoteScorer(echo.url)(noise(1), [prompt])
    assert judgement.details["text"].tolist() == [prompt.text]
    assert judgement.details["index"].tolist() == [3]
    assert judgement.details["seen"].tolist() == [repr(metadata)]
    assert judgement.details["alone"].dtype == np.bool_


@pytest.mark.parametrize("metadata", [{"a": (1, 2)}, {"a": float("nan")}, {"a": {1: 2}}, {"a": object()}])
def test_metadata_that_json_would_change_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^metadata (is not JSON|changes when converted)"):
        RemoteScorer.check(Prompt(index=0, text="a", metadata=metadata))


def test_what_is_missing_stays_missing(echo: Server) -> None:
    asked = [Prompt(index=i, text=text) for i, text in enumerate(["a", "nan", "invalid"])]
    judgement = RemoteScorer(echo.url)(noise(3), asked)
    assert judgement.valid.tolist() == [True, False, False]
    assert np.isnan(judgement.values).tolist() == [False, True, False]
    assert np.isnan(judgement.details["level"]).tolist() == [False, True, False]


def test_a_failing_scorer_is_a_named_error_and_the_server_lives(echo: Server) -> None:
    remote = RemoteScorer(echo.url, batch=2)
    with pytest.raises(RewardError, match=r"500: .*'echo_reward:Echo' failed: ZeroDivisionError: by hand"):
        remote(noise(1), prompts(1, "fail"))
    with pytest.raises(RewardError, match=r"500: .*details do not fit JSON"):
        remote(noise(1), prompts(1, "odd"))
    assert remote(noise(3), prompts(3)).valid.all()


def test_a_scorer_that_is_not_thread_safe_is_never_entered_twice(echo: Server) -> None:
    remote = RemoteScorer(echo.url, batch=1, concurrency=8)
    assert remote(noise(24), prompts(24, sleep=0.01)).details["alone"].all()


def test_what_a_gone_client_queued_is_not_scored(own: Path) -> None:
    with served("echo_reward:Echo", own=own) as server:
        hasty = RemoteScorer(server.url, batch=1, concurrency=6, timeout=0.5)
        with pytest.raises(
            RewardError, match=r"did not answer: ReadTimeout.*/health says that it is"
        ) as told:
            hasty(noise(6), prompts(6, sleep=1.5))
        assert not isinstance(told.value, Unavailable)
        started = time.monotonic()
        assert RemoteScorer(server.url)(noise(1), prompts(1)).valid.all()
        assert time.monotonic() - started < 4.5  # the one that had begun, and not all six of 1.5 s


def test_a_refused_connection_fails_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(
        RewardError, match=rf"server at http://127.0.0.1:{port}/? did not answer: ConnectError"
    ):
        RemoteScorer(f"http://127.0.0.1:{port}")
    assert time.monotonic() - started < 2


def test_a_server_that_is_loading_is_not_ready(own: Path) -> None:
    with served("echo_reward:Echo", "--options", "wait=1.5", own=own) as server:
        with pytest.raises(RewardError, match=r'answered 503: .*"ready": false'):
            RemoteScorer(server.url)
        server.wait_until_ready()
        assert RemoteScorer(server.url)(noise(1), prompts(1)).valid.all()


def test_a_reward_of_whole_groups_is_refused(own: Path) -> None:
    refused = pytest.raises(RewardError, match="scores whole groups")
    with served("echo_reward:Groups", own=own) as server, refused:
        RemoteScorer(server.url)


HEALTH = (
    b'{"version": 1, "name": "x", "ready": true, "traits": {"low": 0, "high": null, '
    b'"thread_safe": true, "needs_gpu": false, "groupwise": false}}'
)


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (302, b"elsewhere", "answered 302: elsewhere"),
        (200, b"<html>", "not JSON"),
        (200, b'{"version": 1, "values": [NaN], "valid": [true], "details": {}}', "not JSON: NaN"),
        (200, b'{"version": 2, "values": [1.0], "valid": [true], "details": {}}', "version"),
        (200, b'{"version": 1, "values": [1.0], "valid": ["yes"], "details": {}}', r"valid\.0"),
        (200, b'{"version": 1, "values": [1.0, 2.0], "valid": [true], "details": {}}', "expected 1 of each"),
        (200, b'{"version": 1, "values": [1.0], "valid": [true], "details": {"a": []}}', "'a': 0"),
        (200, b'{"version": 1, "values": [1.0], "valid": [true]}', "details: Field required"),
    ],
)
def test_an_answer_that_does_not_follow_the_protocol_is_an_error(
    status: int, answer: bytes, message: str
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def _say(self, status: int, body: bytes) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._say(200, HEALTH)

        def do_POST(self) -> None:
            self._say(status, answer)

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = RemoteScorer(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(RewardError, match=message):
            remote(noise(1), prompts(1))
        server.shutdown()


@pytest.mark.parametrize("status", [502, 503, 504])
@pytest.mark.parametrize("ready", [True, False])
def test_only_a_server_that_is_not_ready_is_away(status: int, ready: bool) -> None:
    told = [True]

    class Handler(BaseHTTPRequestHandler):
        def _say(self, status: int, body: bytes = b"") -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._say(200 if told[0] else 503, HEALTH)

        def do_POST(self) -> None:
            self._say(status)

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = RemoteScorer(f"http://127.0.0.1:{server.server_port}")
        told[0] = ready
        with pytest.raises(RewardError, match=f"answered {status}") as caught:
            remote(noise(1), prompts(1))
        server.shutdown()
    assert isinstance(caught.value, Unavailable) is not ready


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://me:secret@127.0.0.1:1"}, "url must not hold a password"),
        ({"token_env": "NO_SUCH_TOKEN"}, "no token in the environment variable NO_SUCH_TOKEN"),
        ({"token_file": "/no/such/file"}, "token_file: .*No such file"),
        ({"token_file": "utf16"}, "token_file: utf16: is UTF-16; save it as UTF-8"),
        (
            {"token_file": "unseen"},
            r"unseen: expected printable ASCII, got '.u200b' as character 2",
        ),
        ({"token_env": "A", "token_file": "B"}, "not from both"),
        ({"batch": 0}, "must be above 0, got 60.0, 0 and 4"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("utf16").write_text("secret", encoding="utf-16")
    Path("unseen").write_text("s\u200becret", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        RemoteScorer(**{"url": "http://127.0.0.1:1", **options})
    assert "secret" not in str(caught.value)


def test_many_callers_may_share_one_scorer(echo: Server) -> None:
    remote = RemoteScorer(echo.url, batch=2)
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(remote, noise(5), prompts(5, str(i), value=i / 8)) for i in range(8)]
    for i, call in enumerate(calls):
        assert call.result().values.tolist() == [i / 8] * 5
        assert call.result().details["text"].tolist() == [str(i)] * 5


def test_the_clients_are_light_enough_for_the_driver() -> None:
    heavy = "{'torch', 'aiohttp'} & set(sys.modules)"
    probe = (
        f"import sys, rewards.scorers.remote, rewards.scorers.vlm_judge; sys.exit(', '.join({heavy}) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
