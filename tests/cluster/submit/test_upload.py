"""Checks before a job: the cluster's authentication, the source of the token, and the upload."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.config.errors import UserError
from cluster.submit import upload as submission
from cluster.submit.upload import check_travels, pack, reach, read_token

TOKEN = "a-token-of-the-test"
Serve = Callable[..., str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Remove tokens from the home folder and the environment."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # `reach` sets it, and monkeypatch takes it back
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def asked() -> list[str | None]:
    """The Authorization header of every request that a server of the test got."""
    return []


@pytest.fixture
def serve(asked: list[str | None]) -> Iterator[Serve]:
    """Start a server that answers as a dashboard without a token, with one, or as another service."""
    servers: list[ThreadingHTTPServer] = []

    def start(token: str | None = None, body: bytes = b'{"ray_version": "2.60.0"}') -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                given = self.headers.get("Authorization")
                asked.append(given)
                wrong = 401 if given is None else 403
                self.send_response(200 if token is None or given == f"Bearer {token}" else wrong)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refused(address: str) -> str:
    with pytest.raises(UserError) as caught:
        reach(address, print)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def test_a_cluster_with_a_token(
    serve: Serve, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    told: list[str] = []
    assert reach(serve(TOKEN), told.append)
    assert not told
    assert asked[0] is None
    assert set(asked[1:]) == {f"Bearer {TOKEN}"}


def test_an_open_cluster_elsewhere_is_refused(
    serve: Serve, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(submission, "_loopback", lambda host: False)
    address = serve()
    assert refused(address).startswith(
        f"--address: {address} answers without a token, so anyone who reaches it can run code on it; "
    )
    assert asked == [None]


def test_an_open_cluster_of_this_machine_is_warned_of(serve: Serve) -> None:
    told: list[str] = []
    address = serve()
    assert reach(address, told.append)
    assert told == [
        f"warning: {address} answers without a token: anyone who reaches it can run code on it "
        "(see SECURITY.md)"
    ]


def test_the_environment_does_not_lead_elsewhere(
    serve: Serve, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert reach(serve(TOKEN), print)
    assert asked[-1] == f"Bearer {TOKEN}"


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.9.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("head", False),
        ("localhost.elsewhere.example", False),
        ("0.0.0.0", False),
    ],
)
def test_what_counts_as_this_machine(host: str, here: bool) -> None:
    assert submission._loopback(host) is here


def test_a_wrong_token(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    address = serve("another")
    assert refused(address) == f"RAY_AUTH_TOKEN: {address} refuses this token"


def test_no_token(serve: Serve, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = serve(TOKEN)
    assert refused(address) == (
        "the cluster requires a token, and ~/.ray/auth_token cannot be read: No such file or directory; "
        "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it"
    )
    (home / "empty").touch()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "empty"))
    assert refused(address).endswith(f"no token in RAY_AUTH_TOKEN_PATH={home / 'empty'}")
    (home / "empty").write_bytes(b"\xff\xfe")
    assert f"cannot be read: {home / 'empty'}: is UTF-16; save it as UTF-8" in refused(address)
    (home / "empty").write_text("token\u200b", encoding="utf-8")
    assert "expected printable ASCII, got '\\u200b' as character 6" in refused(address)


def test_where_a_token_comes_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("third\n")
    assert read_token() == ("third", "~/.ray/auth_token")
    (home / "file").write_text(" second\n", encoding="utf-8-sig")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "file"))
    assert read_token() == ("second", f"RAY_AUTH_TOKEN_PATH={home / 'file'}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "first")
    assert read_token() == ("first", "RAY_AUTH_TOKEN")


def test_addresses_that_are_none(serve: Serve) -> None:
    for address in ("ray://head:10001", "head:8265", "http://"):
        assert refused(address) == f"--address: expected a dashboard's http://HOST:8265, got {address!r}"
    assert refused("http://head:x").startswith("--address: 'http://head:x' is not an address: ")
    assert refused("http://127.0.0.1:1").startswith(
        "--address: no Ray dashboard answers at http://127.0.0.1:1: "
    )
    address = serve(body=b"hello")
    assert refused(address) == f"--address: {address} answers 200; expected a Ray dashboard"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with files to upload and files to ignore."""
    folder = tmp_path / "checkout"
    for name in ("cluster/train.py", "data/big.bin", "runs/one/log", ".git/config", "rollout/prompts.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 1000)
    (folder / ".rayignore").write_text("data/\n")
    (folder / ".gitignore").write_text("runs/\n")
    return folder


def test_an_upload_leaves_behind_what_is_ignored(checkout: Path, tmp_path: Path) -> None:
    upload = pack(checkout, tmp_path / "upload.zip")
    assert upload.files == {".rayignore", ".gitignore", "cluster/train.py", "rollout/prompts.txt"}
    assert upload.size == upload.path.stat().st_size > 2000


def test_an_upload_that_is_too_big(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "LIMIT", 2**20)
    with (checkout / "cluster" / "weights.bin").open("wb") as file:
        file.truncate(3 * 2**20)
    with pytest.raises(
        UserError, match=r"the upload has 3\.0 MiB, but Ray accepts at most 1\.0 MiB; most of it: cluster"
    ) as e:
        pack(checkout, tmp_path / "upload.zip")
    assert "cluster/weights.bin 3.0 MiB" in str(e.value)
    assert "List files that a job does not need in .rayignore" in str(e.value)


def test_paths_that_would_stay_behind(checkout: Path, tmp_path: Path) -> None:
    upload = pack(checkout, tmp_path / "upload.zip")
    fine = ("rollout/prompts.txt", "./rollout/../rollout/prompts.txt", "rollout", "/models/x", "org/model")
    check_travels({path: Path(path) for path in fine}, upload, checkout)
    (tmp_path / "outside.txt").touch()
    for path in ("data/big.bin", "../outside.txt"):
        with pytest.raises(UserError, match=f"^prompts.train: {path} is not part of the upload"):
            check_travels({"prompts.train": Path(path)}, upload, checkout)
