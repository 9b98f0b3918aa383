"""Checks before a job is submitted: the cluster requires a token, it is known, and the upload is small."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from zipfile import ZipFile

import httpx
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.config.address import ADDRESS_VARIABLE
from cluster.config.errors import UserError
from rollout.text_files import TextFileError, check_token, read_text

LIMIT: Final = 100 * 2**20
"""Bytes of a request that the dashboard of a Ray cluster accepts; it refuses more with status 413."""
TOKEN_FILE: Final = Path(".ray") / "auth_token"
"""Ray's own token file, below the home folder."""
UNAUTHORISED: Final = 401
TIMEOUT: Final = 5.0
"""Seconds within which a dashboard must answer."""


def reach(address: str, print_line: Callable[[str], None]) -> JobSubmissionClient:
    """Make a client for the cluster at a dashboard's address, which must require a token.

    The token is sent only if an anonymous request was refused.

    Raises:
        UserError: if nothing answers there, no token is required, or the token is missing or wrong.
    """
    host = _host(address)
    try:
        answer = httpx.get(f"{address.rstrip('/')}/api/version", timeout=TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"--address: no Ray dashboard answers at {address}: {error}") from None
    if answer.status_code == UNAUTHORISED:
        return _with_token(address)
    if answer.status_code != httpx.codes.OK or "ray_version" not in answer.text:
        raise UserError(f"--address: {address} answers {answer.status_code}; expected a Ray dashboard")
    if not _loopback(host):
        raise UserError(
            f"--address: {address} answers without a token, so anyone who reaches it can run code on it; "
            "nothing was sent. Start its head, workers and clients with RAY_AUTH_MODE=token (see SECURITY.md)"
        )
    print_line(
        f"warning: {address} answers without a token: anyone who reaches it can run code on it "
        "(see SECURITY.md)"
    )
    return _client(address, {})


def _client(address: str, headers: dict[str, str]) -> JobSubmissionClient:
    """Make a client for the checked address, which is set in the environment, too: Ray prefers that one."""
    os.environ[ADDRESS_VARIABLE] = address
    return JobSubmissionClient(address, headers=headers)


def _host(address: str) -> str:
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise UserError(f"--address: {address!r} is not an address: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"--address: expected a dashboard's http://HOST:8265, got {address!r}")
    return url.host


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _with_token(address: str) -> JobSubmissionClient:
    token, source = read_token()
    try:
        return _client(address, {"Authorization": f"Bearer {token}"})
    except AuthenticationError:
        raise UserError(f"{source}: {address} refuses this token") from None


def read_token() -> tuple[str, str]:
    """Read the token and its source: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or Ray's own file.

    Raises:
        UserError: if the token is missing, or does not fit into a header.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return _sendable(token, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / TOKEN_FILE
    source = f"RAY_AUTH_TOKEN_PATH={path}" if named else f"~/{TOKEN_FILE}"
    try:
        token = read_text(path).strip()
    except (OSError, TextFileError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"the cluster requires a token, and {source} cannot be read: {reason}; "
            "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it"
        ) from None
    return _sendable(token, source)


def _sendable(token: str, source: str) -> tuple[str, str]:
    try:
        check_token(token, source)
    except ValueError as error:
        raise UserError(f"the cluster requires a token: {error}") from None
    return token, source


@dataclass(frozen=True, slots=True)
class Upload:
    """A zip file of the checkout, its size in bytes and the files in it."""

    path: Path
    size: int
    files: frozenset[str]

    def contains(self, path: Path) -> bool:
        """Return whether a file, or anything below a folder, is in it; paths are relative to the checkout."""
        name = path.as_posix()
        return name in self.files or any(file.startswith(f"{name}/") for file in self.files)


def pack(checkout: Path, target: Path) -> Upload:
    """Pack a checkout as ``ray job submit --working-dir`` does, without ignored files.

    Raises:
        UserError: if it is larger than the dashboard accepts.
    """
    quiet = logging.getLogger(f"{__name__}.quiet")
    quiet.setLevel(logging.ERROR)
    excludes = get_runtime_env_default_excludes()
    create_package(str(checkout), target, include_gitignore=True, excludes=excludes, logger=quiet)
    size = target.stat().st_size
    with ZipFile(target) as packed:
        sizes = {entry.filename: entry.file_size for entry in packed.infolist()}
    if size > LIMIT:
        raise UserError(
            f"the upload has {mebibytes(size)}, but Ray accepts at most {mebibytes(LIMIT)}; "
            f"most of it: {_largest(sizes)}. List files that a job does not need in .rayignore"
        )
    return Upload(target, size, frozenset(sizes))


def _largest(sizes: Mapping[str, int]) -> str:
    folders: Counter[str] = Counter()
    for name, size in sizes.items():
        folders["/".join(name.split("/")[:2])] += size
    return ", ".join(f"{name} {mebibytes(size)}" for name, size in folders.most_common(3))


def mebibytes(size: int) -> str:
    """Format a number of bytes in MiB."""
    return f"{size / 2**20:.1f} MiB"


def check_travels(named: Mapping[str, Path], upload: Upload, checkout: Path) -> None:
    """Check that paths in the checkout are part of the upload.

    Raises:
        UserError: naming the key and the path.
    """
    for key, path in named.items():
        if path.is_absolute() or not (checkout / path).exists():  # on the cluster, or a model of the hub
            continue
        if not upload.contains(Path(os.path.normpath(path))):
            raise UserError(
                f"{key}: {path} is not part of the upload: .gitignore or .rayignore excludes it, or it is "
                "not in the checkout. Name a file of the upload, or an absolute path on the cluster"
            )
