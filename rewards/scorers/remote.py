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
"""What is answered for a server that is gone or not ready yet."""


class RemoteScorer:
    """Scores (N, H, W, 3) images by whatever ``url`` serves; values and details are the served scorer's.

    ``token_env`` or ``token_file`` say where the server's token is. A call is sent as requests of at most
    ``batch`` images, ``concurrency`` at a time, each of which may take ``timeout`` seconds. Nothing is
    retried here. A request without an answer is a failure of its images if the server says that it is ready,
    a `RewardError`; otherwise the server is away: `Unavailable`. Raises `RewardError` also when it judges
    whole groups, which this class's traits do not promise.
    """

    traits: Traits = Traits(low=-math.inf, high=math.inf, thread_safe=True)
    """Of the class; an instance knows the range of what is served."""

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
        """Have every image scored; one failed request fails the call."""
        size = self._batch
        starts = range(0, len(images), size)
        chunks = ([sequence[at : at + size] for at in starts] for sequence in (images, prompts))
        with ThreadPoolExecutor(self._concurrency) as threads:
            scored = list(threads.map(self._score, *chunks))
        if len({frozenset(part.details) for part in scored}) > 1:
            raise self._failed("answered with different details to each request")
        return Judgement(
            values=np.concatenate([part.values for part in scored]),
            valid=np.concatenate([part.valid for part in scored]),
            details={name: np.concatenate([s.details[name] for s in scored]) for name in scored[0].details},
        )

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Raise ``ValueError`` when JSON would not carry the prompt's metadata as it is."""
        metadata = dict(prompt.metadata)
        try:
            same = json.loads(json.dumps(metadata, allow_nan=False)) == metadata
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"metadata is not JSON: {error}") from None
        if not same:
            raise ValueError(f"metadata changes on its way through JSON: {metadata!r}")

    def _served(self) -> Traits:
        """The traits of what is served, as this scorer has them."""
        served = self._health(self._client.timeout).traits
        if served.groupwise:
            raise self._failed("judges whole groups, which a remote reward may split")
        low = -math.inf if served.low is None else served.low
        high = math.inf if served.high is None else served.high
        return Traits(low=low, high=high, thread_safe=True)

    def _score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        body = dump(request_of(images, prompts, self._media_type))
        response = self._read(ScoreResponse, self._answer(body))
        try:
            return judgement_of(response, len(images))
        except ProtocolError as error:
            raise self._failed(f"answered what cannot be: {error}") from error

    def _answer(self, body: bytes) -> bytes:
        """What the server says to a request; if nothing, its health tells whose fault that is."""
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
            raise self._failed(f"answered what cannot be: {error}") from error

    def _failed(self, reason: str, kind: type[RewardError] = RewardError) -> RewardError:
        return kind(f"the reward server at {self._client.base_url} {reason}")
