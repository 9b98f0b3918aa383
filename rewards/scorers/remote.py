"""A reward in another process, environment or machine, behind ``python -m rewards.serve``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import httpx
import numpy as np
from numpy.typing import NDArray

from rewards.scorer import PROBE, Judgement, RewardError, Traits, Unavailable
from rewards.wire_format import (
    Health,
    M,
    MediaType,
    ProtocolError,
    ScoreResponse,
    dump,
    judgement_of,
    parse,
    read_token,
    request_of,
)
from rollout.records import Prompt

AWAY: Final = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)
"""Statuses of a server that is down or not ready yet."""


class RemoteScorer:
    """Client of the scorer at ``url`` for (N, H, W, 3) images; values and details are the served scorer's.

    ``token_env`` or ``token_file`` names the source of the server's token. A call is sent as requests of at
    most ``batch`` images, ``concurrency`` at a time, each of which may take ``timeout`` seconds. Requests are
    not retried here. If one gets no response while the server reports that it is ready, its images failed: a
    `RewardError`; otherwise the server is down: `Unavailable`.
    """

    traits: Traits = Traits(low=-math.inf, high=math.inf, thread_safe=True)
    """Traits of the class; an instance has the range of the served scorer."""

    def __init__(
        self,
        url: str,
        token_env: str = "",
        token_file: str = "",
        timeout: float = 60.0,
        batch: int = 16,
        concurrency: int = 4,
        media_type: MediaType = "image/png",
    ) -> None:
        """Connect to the server and read its traits.

        Raises:
            ValueError: if an option has a wrong value, or the token cannot be read.
            RewardError: if the server gives no valid health, or its scorer needs whole groups.
        """
        if httpx.URL(url).userinfo:
            raise ValueError("url must not hold a password; name a token with token_env or token_file")
        if min(timeout, batch, concurrency) <= 0:
            raise ValueError(
                f"timeout, batch and concurrency must be above 0, got {timeout}, {batch} and {concurrency}"
            )
        token = read_token(token_env, token_file)
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout,
            limits=httpx.Limits(max_connections=None),
        )
        self._batch, self._concurrency, self._media_type = batch, concurrency, media_type
        self._probe = min(PROBE, timeout)
        self.traits = self._served()

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Have every image scored; one failed request fails the whole call."""
        size = self._batch
        starts = range(0, len(images), size)
        chunks = ([sequence[at : at + size] for at in starts] for sequence in (images, prompts))
        with ThreadPoolExecutor(self._concurrency) as threads:
            scored = list(threads.map(self._score, *chunks))
        if len({frozenset(part.details) for part in scored}) > 1:
            raise self._failed("sent different details for different requests")
        return Judgement(
            values=np.concatenate([part.values for part in scored]),
            valid=np.concatenate([part.valid for part in scored]),
            details={name: np.concatenate([s.details[name] for s in scored]) for name in scored[0].details},
        )

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Refuse a prompt whose metadata JSON cannot represent exactly.

        Raises:
            ValueError: if the metadata changes in, or does not fit, JSON.
        """
        metadata = dict(prompt.metadata)
        try:
            same = json.loads(json.dumps(metadata, allow_nan=False)) == metadata
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"metadata is not JSON: {error}") from None
        if not same:
            raise ValueError(f"metadata changes when converted to JSON and back: {metadata!r}")

    def _served(self) -> Traits:
        """Return the traits of the served scorer, which every remote scorer may call from several threads."""
        served = self._health(self._client.timeout).traits
        if served.groupwise:
            raise self._failed("scores whole groups, which a remote reward may split")
        low = -math.inf if served.low is None else served.low
        high = math.inf if served.high is None else served.high
        return Traits(low=low, high=high, thread_safe=True)

    def _score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        body = dump(request_of(images, prompts, self._media_type))
        response = self._read(ScoreResponse, self._answer(body))
        try:
            return judgement_of(response, len(images))
        except ProtocolError as error:
            raise self._failed(f"sent an invalid response: {error}") from error

    def _answer(self, body: bytes) -> bytes:
        """Return the response to a request; without one, `/health` decides whether the server is down."""
        try:
            return self._send("POST", "score", content=body)
        except Unavailable as error:
            try:
                ready = self._health(self._probe).ready
            except RewardError:
                ready = False
            if not ready:
                raise
            raise RewardError(f"{error}; its /health says that it is ready") from error

    def _health(self, timeout: float | httpx.Timeout) -> Health:
        return self._read(Health, self._send("GET", "health", timeout=timeout))

    def _send(self, method: str, path: str, **more: Any) -> bytes:
        try:
            response = self._client.request(method, path, **more)
        except httpx.HTTPError as error:
            raise self._failed(f"did not answer: {type(error).__name__}: {error}", Unavailable) from error
        if response.status_code != httpx.codes.OK:
            kind = Unavailable if response.status_code in AWAY else RewardError
            raise self._failed(f"answered {response.status_code}: {response.text[:300].strip()}", kind)
        return response.content

    def _read(self, message: type[M], body: bytes) -> M:
        try:
            return parse(message, body)
        except ProtocolError as error:
            raise self._failed(f"sent an invalid response: {error}") from error

    def _failed(self, reason: str, kind: type[RewardError] = RewardError) -> RewardError:
        return kind(f"the reward server at {self._client.base_url} {reason}")
