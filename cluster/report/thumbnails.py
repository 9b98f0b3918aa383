"""Images inside a page that opens offline, bounded in size."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

from PIL import Image

SMALL: Final = 128  # up to this side, in pixels, an image is kept exactly and shown with hard pixels
THUMBNAIL: Final = 320
THUMBNAIL_BYTES: Final = 48 * 1024
_QUALITIES: Final = (86, 74, 60, 45, 30)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as a data URI, with the size at which it is stored."""

    uri: str
    width: int
    height: int
    exact: bool


def picture(path: Path) -> Picture | None:
    """Read an image, exactly if it is small, else as a JPEG thumbnail; None if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError):  # Pillow reports some broken PNG files as a SyntaxError
        return None
    if max(image.size) <= SMALL:
        return Picture(_uri("png", _encode(image, "PNG", optimize=True)), *image.size, exact=True)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return Picture(_uri("jpeg", _thumbnail(image)), *image.size, exact=False)


def _thumbnail(image: Image.Image) -> bytes:
    """Encode the best JPEG within the bound; at the lowest quality even pure noise of this size fits."""
    data = b""
    for quality in _QUALITIES:
        data = _encode(image, "JPEG", quality=quality, optimize=True)
        if len(data) <= THUMBNAIL_BYTES:
            break
    return data


def _encode(image: Image.Image, kind: str, **options: int | bool) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
