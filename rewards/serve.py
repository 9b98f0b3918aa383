"""Serve a reward: ``python -m rewards.serve NAME [--options KEY=VALUE ...] [--port 8411]``.

NAME is a built-in reward or a scorer of your own as module:Class. The reward "remote" is the client, and
rewards/README.md the protocol. Listens on loopback by default; any other address needs a token.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from typing import Any, Final, TypeVar

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from rewards.registry import resolve
from rewards.scorer import RewardError
from rewards.wire_format import (
    VERSION,
    Health,
    ProtocolError,
    ScoreRequest,
    decode_images,
    dump,
    parse,
    prompts_of,
    read_token,
    response_of,
    wire_traits,
)
from rewards.worker import RewardWorker
from rollout.records import Prompt

PROG: Final = "python -m rewards.serve"
PORT: Final = 8411

T = TypeVar("T")


class RewardServer:
    """One scorer behind ``GET /health`` and ``POST /score``, created in the background once it is running.

    A scorer that is not thread-safe runs in a single thread; any other uses one per core.
    """

    def __init__(self, name: str, options: Mapping[str, Any], token: str | None, max_body: int) -> None:
        """Resolve the scorer's class.

        Raises:
            ValueError: if the name is unknown or its class is not a scorer.
        """
        self._traits = resolve(name).traits
        self._name, self._options, self._token, self._max_body = name, options, token, max_body
        self._threads = ThreadPoolExecutor(os.cpu_count() if self._traits.thread_safe else 1)
        self._worker: RewardWorker | None = None
        self.failure: RewardError | None = None
        """The reason why the scorer could not be created, if so."""

    def application(self) -> web.Application:
        """Build the application to run; it exits if the scorer cannot be created."""
        application = web.Application(client_max_size=self._max_body)
        application.add_routes([web.get("/health", self.health), web.post("/score", self.score)])
        application.on_startup.append(self._start)
        return application

    async def health(self, request: web.Request) -> web.Response:
        """Report the served reward, with status 503 until its scorer is loaded. Needs no token."""
        ready = self._worker is not None
        health = Health(version=VERSION, name=self._name, ready=ready, traits=wire_traits(self._traits))
        return _json(dump(health), 200 if ready else 503)

    async def score(self, request: web.Request) -> web.Response:
        """Score images; the statuses 400, 401, 413, 500 and 503 have the body ``{"error": reason}``."""
        if not self._admitted(request):
            return _refusal(401, "expected the header 'Authorization: Bearer TOKEN' with the right token")
        if self._worker is None:
            return _refusal(503, f"{self._name} is not loaded yet")
        try:
            images, prompts = await asyncio.to_thread(_read, await request.read())
            answer = await self._in_scorer_thread(partial(_answer, self._worker, images, prompts))
        except web.HTTPRequestEntityTooLarge:
            return _refusal(413, f"the body is over {self._max_body} bytes")
        except (ProtocolError, web.RequestPayloadError) as error:
            return _refusal(400, str(error))
        except RewardError as error:
            return _refusal(500, str(error))
        return _json(answer, 200)

    def _admitted(self, request: web.Request) -> bool:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        return self._token is None or hmac.compare_digest(given, f"Bearer {self._token}".encode())

    async def _start(self, application: web.Application) -> None:
        self._making = asyncio.create_task(self._make())

    async def _make(self) -> None:
        try:
            self._worker = await self._in_scorer_thread(partial(RewardWorker, self._name, self._options))
        except RewardError as error:
            self.failure = error
            raise web.GracefulExit from None

    async def _in_scorer_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _read(body: bytes) -> tuple[NDArray[np.uint8], list[Prompt]]:
    question = parse(ScoreRequest, body)
    return decode_images(question), prompts_of(question)


def _answer(worker: RewardWorker, images: NDArray[np.uint8], prompts: list[Prompt]) -> bytes:
    judgement = worker.score(images, prompts)
    try:
        return dump(response_of(judgement))
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {worker.name!r}: its details do not fit JSON: {error}") from error


def _json(body: bytes, status: int) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def _refusal(status: int, reason: str) -> web.Response:
    return _json(json.dumps({"error": reason}).encode(), status)


def main(arguments: list[str]) -> int:
    """Run the command line until SIGTERM or Ctrl-C and return the exit status."""
    given = _parser().parse_args(arguments)
    try:
        token = read_token(given.token_env, given.token_file)
        if token is None and not _is_loopback(given.host):
            raise ValueError(f"--host {given.host} is not loopback: give --token-env or --token-file")
        server = RewardServer(given.name, _options(given.options), token, given.max_body)
        listening = socket.create_server((given.host, given.port), family=_family(given.host))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    web.run_app(
        server.application(),
        sock=listening,
        handler_cancellation=True,  # do not score queued requests whose client has disconnected
        print=partial(print, flush=True),
    )
    if server.failure:
        print(f"error: {server.failure}", file=sys.stderr)
    return 1 if server.failure else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="Serve a reward over HTTP.")
    parser.add_argument("name", help="a built-in reward, or module:Class")
    parser.add_argument(
        "--options",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of the scorer, or one JSON object",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: loopback")
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}; 0 takes a free one")
    parser.add_argument("--token-env", default="", metavar="NAME", help="environment variable with the token")
    parser.add_argument("--token-file", default="", metavar="PATH", help="file with the token")
    parser.add_argument(
        "--max-body", type=int, default=64 * 2**20, metavar="BYTES", help="largest request; default: 64 MiB"
    )
    return parser


def _options(words: list[str]) -> dict[str, Any]:
    """Parse options: ``key=value`` words, whose values are JSON or else text, or a whole JSON object."""
    options: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        whole = _json_or_text(word)
        if isinstance(whole, dict):
            options |= whole
        elif separator and key.isidentifier():
            options[key] = _json_or_text(value)
        else:
            raise ValueError(f"--options: expected key=value or a JSON object, got {word!r}")
    return options


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
