"""The messages between a reward server and its clients: JSON, and images in base64. See rewards/README.md."""

from __future__ import annotations

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rewards.scorer import Judgement, Traits
from rollout.records import Prompt
from rollout.text_files import TextFileError, check_token, read_text

VERSION: Final = 1
MAX_PIXELS: Final = 2**26
"""Limit on the pixels of all images of a request together: a few kilobytes of PNG can hold gigabytes."""

MediaType = Literal["image/png", "image/webp"]
_ENCODING: Final[dict[MediaType, dict[str, Any]]] = {
    "image/png": {"format": "PNG", "compress_level": 1},
    "image/webp": {"format": "WEBP", "lossless": True, "method": 0},
}

_PNG_DEPTH: Final = 24
"""Offset, in a PNG file's header, of the number of bits per channel."""


class ProtocolError(ValueError):
    """A message does not follow the protocol; the text names the field and what was expected."""


class Message(BaseModel):
    """Base class of the messages: unknown fields and values of another JSON type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class WirePrompt(Message):
    """A `Prompt`."""

    index: int
    text: str
    metadata: dict[str, Any] = Field(default_factory=dict)


class ScoreRequest(Message):
    """``POST /score``: N images of one size as files in base64, and their N prompts."""

    version: Literal[1]
    media_type: MediaType
    images: list[str] = Field(min_length=1)
    prompts: list[WirePrompt]

    @model_validator(mode="after")
    def _paired(self) -> ScoreRequest:
        if len(self.images) != len(self.prompts):
            raise ValueError(f"{len(self.images)} images do not fit {len(self.prompts)} prompts")
        return self


class ScoreResponse(Message):
    """A `Judgement`: N values, null where missing; N validities; N of every detail."""

    version: Literal[1]
    values: list[float | None]
    valid: list[bool]
    details: dict[str, list[bool] | list[int] | list[float | None] | list[str]]


class WireTraits(Message):
    """`Traits`; a bound that is not finite is null."""

    low: float | None
    high: float | None
    thread_safe: bool
    needs_gpu: bool
    groupwise: bool


class Health(Message):
    """``GET /health``: the served reward, and whether its scorer is loaded."""

    version: Literal[1]
    name: str
    ready: bool
    traits: WireTraits


M = TypeVar("M", bound=Message)


def parse(message: type[M], body: bytes) -> M:
    """Parse a message.

    Raises:
        ProtocolError: if it is not JSON or not this message.
    """
    try:
        return message.model_validate(json.loads(body, parse_constant=_refuse))
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, one['loc'])) or 'message'}: {one['msg']}" for one in error.errors()[:3]
        ]
        raise ProtocolError("; ".join(faults)) from None
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


def dump(message: Message) -> bytes:
    """Serialise a message.

    Raises:
        ValueError: if it holds a number that JSON does not have.
        TypeError: if it holds a value of a type that JSON does not have.
    """
    return json.dumps(message.model_dump(), allow_nan=False).encode()


def request_of(images: NDArray[np.uint8], prompts: Sequence[Prompt], media_type: MediaType) -> ScoreRequest:
    """Build the request that scores (N, H, W, 3) images."""
    return ScoreRequest(
        version=VERSION,
        media_type=media_type,
        images=[encode_image(image, media_type) for image in images],
        prompts=[WirePrompt(index=p.index, text=p.text, metadata=dict(p.metadata)) for p in prompts],
    )


def prompts_of(request: ScoreRequest) -> list[Prompt]:
    """Return the prompts of a request."""
    return [Prompt(index=p.index, text=p.text, metadata=p.metadata) for p in request.prompts]


def response_of(judgement: Judgement) -> ScoreResponse:
    """Build the response that carries a judgement; numbers that are not finite become null."""
    return ScoreResponse(
        version=VERSION,
        values=_to_json(judgement.values),
        valid=judgement.valid.tolist(),
        details={name: _to_json(np.asarray(detail)) for name, detail in judgement.details.items()},
    )


def judgement_of(response: ScoreResponse, count: int) -> Judgement:
    """Read the judgement of ``count`` images from a response.

    Raises:
        ProtocolError: if the response has another number of values, validities or details.
    """
    lengths = {"values": len(response.values), "valid": len(response.valid)}
    lengths |= {name: len(detail) for name, detail in response.details.items()}
    if set(lengths.values()) != {count}:
        raise ProtocolError(f"expected {count} of each, got {lengths}")
    values = _from_json(response.values).astype(np.float64)
    return Judgement(
        values=values,
        valid=np.array(response.valid, dtype=np.bool_) & np.isfinite(values),
        details={name: _from_json(detail) for name, detail in response.details.items()},
    )


def _to_json(array: NDArray[Any]) -> list[Any]:
    listed: list[Any] = array.tolist()
    if np.issubdtype(array.dtype, np.floating):
        return [value if np.isfinite(value) else None for value in listed]
    return listed


def _from_json(listed: Sequence[Any]) -> NDArray[Any]:
    return np.array([np.nan if value is None else value for value in listed])


def wire_traits(traits: Traits) -> WireTraits:
    """Convert traits to their message."""
    low, high = _to_json(np.array([traits.low, traits.high], dtype=np.float64))
    return WireTraits(
        low=low,
        high=high,
        thread_safe=traits.thread_safe,
        needs_gpu=traits.needs_gpu,
        groupwise=traits.groupwise,
    )


def encode_image(image: NDArray[np.uint8], media_type: MediaType) -> str:
    """Encode an (H, W, 3) image as a lossless file in base64."""
    stream = BytesIO()
    Image.fromarray(image).save(stream, **_ENCODING[media_type])
    return b64encode(stream.getbuffer()).decode("ascii")


def decode_images(request: ScoreRequest) -> NDArray[np.uint8]:
    """Decode the (N, H, W, 3) images of a request.

    Raises:
        ProtocolError: naming the first image that cannot be decoded, is too large or differs in shape.
    """
    images: list[NDArray[np.uint8]] = []
    for number, text in enumerate(request.images):
        try:
            images.append(_decode(text, request.media_type, MAX_PIXELS // len(request.images)))
            if images[-1].shape != images[0].shape:
                raise ValueError(f"its shape {images[-1].shape} is not the first's {images[0].shape}")
        except Exception as error:  # what a decoder raises on foreign bytes is not listed anywhere
            raise ProtocolError(f"images[{number}]: expected {request.media_type}, RGB: {error}") from error
    return np.stack(images)


def _decode(text: str, media_type: MediaType, most: int) -> NDArray[np.uint8]:
    raw = b64decode(text, validate=True)
    with Image.open(BytesIO(raw), formats=[_ENCODING[media_type]["format"]]) as file:
        width, height = file.size  # from the header: nothing is decompressed yet
        if width * height > most:
            raise ValueError(f"{width} x {height} is over the limit of {most} pixels")
        if media_type == "image/png" and raw[_PNG_DEPTH] != 8:  # Pillow would drop the lower byte of 16 bits
            raise ValueError(f"it has {raw[_PNG_DEPTH]} bits per channel, not 8")
        if file.mode != "RGB" or file.has_transparency_data:
            raise ValueError(f"its mode is {file.mode}{' with transparency' * file.has_transparency_data}")
        return np.asarray(file)


def read_token(env: str, file: str) -> str | None:
    """Read the token from the environment variable ``env`` or from ``file``; None if neither is named.

    Raises:
        ValueError: if both are named, or the one named holds no token that an HTTP header can carry.
    """
    if env and file:
        raise ValueError("the token comes from token_env or from token_file, not from both")
    if not env and not file:
        return None
    try:
        token = (os.environ.get(env, "") if env else read_text(Path(file))).strip()
    except (OSError, TextFileError) as error:
        raise ValueError(f"token_file: {error}") from None
    check_token(token, f"the environment variable {env}" if env else file)
    return token
