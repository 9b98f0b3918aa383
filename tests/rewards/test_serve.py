from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import zlib
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from rewards.scorer import RewardError
from rewards.scorers.remote import RemoteScorer
from rewards.serve import main
from rewards.wire_format import MAX_PIXELS
from rollout.records import Prompt
from tests.support.reward_models import png
from tests.support.reward_servers import OWN, ROOT, Server, environment, served

LIMIT = 200_000
TOKEN = {"Authorization": "Bearer right-token"}
SECOND = [Prompt(index=0, text="a", metadata={"sleep": 1.0})]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = ["--token-env", "REWARD_TOKEN", "--max-body", str(LIMIT)]
    with served("jpeg", *flags, REWARD_TOKEN="right-token") as one:
        yield one


def file(mode: str = "RGB", size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
    stream = BytesIO()
    Image.new(mode, size).save(stream, format=format)
    return stream.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header promises side x side pixels."""
    return png(side, 8, b"x")


def transparent() -> bytes:
    """A PNG in RGB, one of whose colours is transparent."""
    stream = BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format="PNG", transparency=(0, 0, 0))
    return stream.getvalue()


def question(*files: bytes, **changes: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "media_type": "image/png",
        "images": [b64encode(one).decode() for one in files],
        "prompts": [{"index": i, "text": "a", "metadata": {}} for i in range(len(files))],
        **changes,
    }


def post(server: Server, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{server.url}/score", content=content, headers=TOKEN if headers is None else headers)


def alive(server: Server) -> bool:
    return post(server, question(file())).status_code == 200 and server.process.poll() is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"version": NaN}', "NaN is not a JSON value"),
        (question(file(), version=2), "version: Input should be 1"),
        (question(file(), more=1), "more: Extra inputs are not permitted"),
        (question(file(), media_type="image/gif"), "media_type"),
        (question(file(), prompts=[]), "1 images do not fit 0 prompts"),
        (question(), "images"),
        (question(file(), prompts=[{"index": "0", "text": "a"}]), r"prompts.0.index"),
        (question(file(), b"no image"), r"images[1]: expected image/png"),
        (question(file(), images=["%%%"]), r"images[0]: expected image/png"),
        (question(file()[:-30]), r"images[0]: expected image/png"),
        (question(file(format="GIF")), r"images[0]: expected image/png"),
        (question(file(), media_type="image/webp"), r"images[0]: expected image/webp"),
        (question(file("RGBA")), r"its mode is RGBA"),
        (question(file("L")), r"its mode is L"),
        (question(png(8, 16, zlib.compress((b"\0" + bytes(48)) * 8))), "it has 16 bits per channel, not 8"),
        (question(file("I;16")), "it has 16 bits per channel, not 8"),
        (question(transparent()), "its mode is RGB with transparency"),
        (question(file(), file(size=(8, 9))), r"images[1]: expected image/png, RGB: its shape (9, 8, 3)"),
        (question(bomb(60_000)), r"images[0]"),
        (question(bomb(9_000)), f"is over the limit of {MAX_PIXELS} pixels"),
        (question(*[bomb(6_000)] * 2), f"is over the limit of {MAX_PIXELS // 2} pixels"),
    ],
)  # fmt: skip
def test_a_bad_request_is_400_with_its_reason(server: Server, body: Any, reason: str) -> None:
    response = post(server, body)
    assert response.status_code == 400, response.text
    assert reason in response.json()["error"]
    assert alive(server)


def test_a_body_that_does_not_unpack_is_400(server: Server) -> None:
    assert post(server, b"junk", {**TOKEN, "Content-Encoding": "gzip"}).status_code == 400
    assert alive(server)


def test_a_body_over_the_limit_is_413(server: Server) -> None:
    assert post(server, b"x" * (LIMIT + 1)).status_code == 413
    assert post(server, b"x" * (50 * LIMIT)).status_code == 413
    endless = httpx.post(f"{server.url}/score", content=iter([b"x" * 50_000] * 20), headers=TOKEN)
    assert endless.status_code == 413
    packed = zlib.compress(b" " * (100 * LIMIT))
    assert post(server, packed, {**TOKEN, "Content-Encoding": "deflate"}).status_code == 413
    assert alive(server)


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "right-token"}, {"Authorization": "Bearer"}],
)
def test_a_wrong_token_is_401(server: Server, headers: dict[str, str]) -> None:
    assert post(server, question(file()), headers).status_code == 401
    assert alive(server)


def test_other_paths_and_methods_are_refused(server: Server) -> None:
    assert httpx.get(f"{server.url}/score").status_code == 405
    assert httpx.get(f"{server.url}/").status_code == 404


def test_the_client_brings_its_token_from_a_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("right-token\n", encoding="utf-8-sig")
    remote = RemoteScorer(server.url, token_file=str(tmp_path / "token"))
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    assert remote(images, [Prompt(index=0, text="a")] * 2).valid.all()
    (tmp_path / "token").write_text("wrong")
    with pytest.raises(RewardError, match=r"answered 401: .*Authorization"):
        RemoteScorer(server.url, token_file=str(tmp_path / "token"))(images, [Prompt(index=0, text="a")] * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jpeg", "--host", "0.0.0.0"], "--host 0.0.0.0 is not loopback: give --token-env or --token-file"),
        (["jpeg", "--host", "rewards.example"], "--host rewards.example is not loopback"),
        (["jpeg", "--token-env", "NO_SUCH_TOKEN"], "no token in the environment variable NO_SUCH_TOKEN"),
        (["geneva"], "unknown reward 'geneva'"),
        (["jpeg", "--options", "small"], "--options: expected key=value or a JSON object, got 'small'"),
        (["jpeg", "--options", "{small"], "--options: expected key=value or a JSON object, got '{small'"),
    ],
)
def test_a_bad_command_line_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def serve_once(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rewards.serve", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_taken_port_and_a_scorer_that_cannot_be_made_end_with_their_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = serve_once("jpeg", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "in use" in done.stderr
    done = serve_once("jpeg", "--port", "0", "--options", '{"prefer": "medium"}')
    assert done.returncode == 1
    assert "could not be made: ValueError: prefer must be 'small' or 'large', got 'medium'" in done.stderr


def test_sigterm_lets_a_request_finish(tmp_path: Path) -> None:
    (tmp_path / "echo_reward.py").write_text(OWN)
    with served("echo_reward:Echo", own=tmp_path) as server, ThreadPoolExecutor(1) as threads:
        remote = RemoteScorer(server.url)
        call = threads.submit(remote, np.zeros((1, 8, 8, 3), dtype=np.uint8), SECOND)
        time.sleep(0.4)
        assert server.end() == 0
        assert call.result().valid.all()
        assert "Traceback" not in server.log
