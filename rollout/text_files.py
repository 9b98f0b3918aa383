"""Reading of users' text files, and removal of invisible characters."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path
from typing import Final

MARK: Final = "\ufeff"
"""The byte order mark as a character."""
_ENCODINGS: Final = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, since it begins with UTF-16's mark
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"})
"""Invisible categories: controls, formats such as zero-width joiners, surrogates, separators."""
_BLANKS: Final = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Invisible fillers and joiners that Unicode counts among letters, marks and symbols."""


class TextFileError(ValueError):
    """A file is not UTF-8; the message names the file, the line, the byte and the remedy."""


def read_text(path: Path) -> str:
    r"""Read a UTF-8 file without its byte order mark; every line ends with "\n".

    Marks at the start of later lines, as from concatenated files, are dropped, too.

    Raises:
        OSError: if the file cannot be read.
        TextFileError: if it is UTF-16 or UTF-32, is not text, or has a byte that is not UTF-8.
    """
    data = path.read_bytes()
    for mark, encoding in _ENCODINGS.items():
        if data.startswith(mark):
            raise TextFileError(f"{path}: is {encoding}; save it as UTF-8")
    if b"\0" in data:
        where = _place(path, data, data.index(b"\0"))
        raise TextFileError(f"{where} is 0, as in UTF-16 or in a file that is not text; save it as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = _place(path, data, error.start)
        raise TextFileError(f"{where} is 0x{data[error.start]:02x}, not UTF-8; save it as UTF-8") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removeprefix(MARK).replace(f"\n{MARK}", "\n")


def _place(path: Path, data: bytes, offset: int) -> str:
    line = data.count(b"\n", 0, offset) + 1
    return f"{path}:{line}: the byte at offset {offset}"


def visible(text: str) -> str:
    """Remove invisible characters: white space, zero-width and control characters, fillers."""
    return "".join(character for character in text if _is_seen(character))


def _is_seen(character: str) -> bool:
    selects_a_glyph = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return not (selects_a_glyph or character in _BLANKS or unicodedata.category(character) in _UNSEEN)


def check_token(token: str, source: str) -> None:
    """Refuse a token that is empty or does not fit into an HTTP header, without printing it.

    Raises:
        ValueError: naming the token's source and the first wrong character.
    """
    if not token:
        raise ValueError(f"no token in {source}")
    for number, character in enumerate(token, start=1):
        if not " " <= character <= "~":
            raise ValueError(
                f"the token in {source}: expected printable ASCII, got {character!a} as character {number}"
            )
