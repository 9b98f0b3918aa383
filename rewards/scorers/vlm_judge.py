"""A vision-language model as a judge, behind any OpenAI-compatible endpoint (vLLM, SGLang)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewards.scorer import PROBE, Judgement, RewardError, Traits, Unavailable, check_text
from rewards.wire_format import encode_image
from rollout.records import Prompt

QUESTION: Final = (
    'How well does the image show "{prompt}"? Look at every object, number, colour, position and text that '
    "it asks for, and at defects. Answer with a score from {low} (not at all) to {high} (perfectly)."
)


class _Reply(BaseModel):
    """The fields of a chat completion that are read."""

    class Choice(BaseModel):
        class Message(BaseModel):
            content: str

        message: Message

    choices: list[Choice] = Field(min_length=1)


class _ScoreReply(BaseModel):
    """The reply that the model is asked for, without other fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    score: float


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer to one question: ``score`` is NaN if missing; ``text`` is the reply or the error."""

    score: float
    text: str
    failure: httpx.HTTPError | None = None


class JudgeScorer:
    """Scorer that asks the model about each (H, W, 3) image and maps ``low`` to ``high`` onto [0, 1].

    ``base_url`` is that of the API, with its ``/v1``. ``question`` may contain {prompt}, {low} and {high}.
    ``api_key_env`` names the environment variable with the key. ``concurrency`` questions are asked at a
    time, and each may take ``timeout`` seconds. Without an answer, or with one that is not a score in range,
    an image is not valid. ``details["answer"]`` is the reply.
    """

    traits: ClassVar[Traits] = Traits(low=0.0, high=1.0, thread_safe=True)

    def __init__(
        self,
        base_url: str,
        model: str,
        question: str = QUESTION,
        low: int = 0,
        high: int = 10,
        api_key_env: str = "",
        concurrency: int = 16,
        timeout: float = 60.0,
    ) -> None:
        if low >= high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        if min(timeout, concurrency) <= 0:
            raise ValueError(f"timeout and concurrency must be above 0, got {timeout} and {concurrency}")
        if api_key_env and not os.environ.get(api_key_env):
            raise ValueError(f"api_key_env: the environment variable {api_key_env} is not set")
        headers = {"Authorization": f"Bearer {os.environ[api_key_env]}"} if api_key_env else {}
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(base_url=base_url, headers=headers, timeout=timeout, limits=limits)
        self._model, self._low, self._high, self._concurrency = model, low, high, concurrency
        self._probe = min(PROBE, timeout)
        self._question = question.replace("{low}", str(low)).replace("{high}", str(high))

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Judgement:
        """Ask about every image separately.

        Raises:
            Unavailable: if no question was answered and the endpoint does not list its models either.
            RewardError: if no question was answered although the endpoint responds.
        """
        with ThreadPoolExecutor(self._concurrency) as threads:
            answers = list(threads.map(self._ask, images, prompts))
        failures = [answer.failure for answer in answers if answer.failure]
        if len(failures) == len(answers):
            silent = any(isinstance(failure, httpx.TransportError) for failure in failures)
            kind = Unavailable if silent and not self._answers() else RewardError
            raise kind(f"the judge at {self._client.base_url}: {answers[0].text}") from failures[0]
        values = (np.array([answer.score for answer in answers]) - self._low) / (self._high - self._low)
        texts = np.array([answer.text for answer in answers], dtype=np.str_)
        return Judgement(values=values, valid=np.isfinite(values), details={"answer": texts})

    @classmethod
    def check(cls, prompt: Prompt) -> None:
        """Refuse a prompt without text; see `check_text`."""
        check_text(prompt)

    def _answers(self) -> bool:
        """Return whether the endpoint responds to a request for its models."""
        try:
            listed = self._client.get("models", timeout=self._probe)
        except httpx.TransportError:
            return False
        return not listed.is_server_error

    def _ask(self, image: NDArray[np.uint8], prompt: Prompt) -> _Answer:
        try:
            response = self._client.post("chat/completions", json=self._body(image, prompt))
            response.raise_for_status()
        except httpx.HTTPStatusError as error:
            reason = error.response.text[:300].strip()
            return _Answer(np.nan, f"{error.response.status_code}: {reason}", error)
        except httpx.HTTPError as error:
            return _Answer(np.nan, f"{type(error).__name__}: {error}", error)
        return self._read(response.content)

    def _body(self, image: NDArray[np.uint8], prompt: Prompt) -> dict[str, Any]:
        picture = f"data:image/png;base64,{encode_image(image, 'image/png')}"
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": self._question.replace("{prompt}", prompt.text)},
        ]
        return {
            "model": self._model,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": self._schema()},
            },
        }

    def _schema(self) -> dict[str, Any]:
        score = {"type": "integer", "minimum": self._low, "maximum": self._high}
        return {
            "type": "object",
            "properties": {"score": score},
            "required": ["score"],
            "additionalProperties": False,
        }

    def _read(self, body: bytes) -> _Answer:
        """Parse a completion into its score; NaN and the whole text if it has no score in range."""
        try:
            text = _Reply.model_validate_json(body).choices[0].message.content
        except ValidationError:
            return _Answer(np.nan, body.decode(errors="replace"))
        try:
            score = _ScoreReply.model_validate_json(text).score
        except ValidationError:
            return _Answer(np.nan, text)
        return _Answer(score if self._low <= score <= self._high else np.nan, text)
