"""Tests of the reader of text files, and of visible characters."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.text_files import TextFileError, check_token, read_text, visible


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("ein K\u00e4fer\n".encode("utf-8-sig"), "ein K\u00e4fer\n"),
        (b"\xef\xbb\xbfa\r\n\xef\xbb\xbfb\rc", "a\nb\nc"),
        (b"", ""),
        (b"\xef\xbb\xbf", ""),
        ("a\ufeffb".encode(), "a\ufeffb"),
    ],
)
def test_marks_and_line_endings_go(tmp_path: Path, data: bytes, text: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    assert read_text(path) == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("a".encode("utf-16"), ": is UTF-16; save it as UTF-8"),
        (b"\xfe\xff\x00a", ": is UTF-16; save it as UTF-8"),
        ("a".encode("utf-32"), ": is UTF-32; save it as UTF-8"),
        (
            "a\nb".encode("utf-16-le"),
            ":1: the byte at offset 1 is 0, as in UTF-16 or in a file",
        ),
        (b"\x89PNG\n\x1a\n\x00", ":3: the byte at offset 7 is 0, as in UTF-16 or in a file"),
        ("a cat\nein K\u00e4fer".encode("latin-1"), ":2: the byte at offset 11 is 0xe4, not UTF-8; save it"),
    ],
)
def test_what_is_not_utf8_is_named(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(TextFileError) as caught:
        read_text(path)
    assert str(caught.value).startswith(f"{path}{reason}")


@given(st.text(st.characters(exclude_characters="\0\r\ufeff", codec="utf-8")))
def test_utf8_is_read_as_it_was_written_and_nothing_else_is(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        assert read_text(path) == text
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(TextFileError, match=f"is {encoding.upper()}; save it as UTF-8"):
            read_text(path)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (" \t\n\u00a0\u2003\u2028", ""),
        ("\u200b\u200c\u200d\u2060\ufeff\u00ad\u202e\x00\x1b\x7f\ud800", ""),
        ("\u115f\u3164\uffa0\u2800\ufe0f\U000e0100\U000e0041", ""),
        ("a\u200bb c", "abc"),
        ("\u0915\u094d\u200d\u0937 \u2764\ufe0f", "\u0915\u094d\u0937\u2764"),
        ("e\u0301", "e\u0301"),
    ],
)
def test_only_what_draws_something_is_visible(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_a_token_is_what_a_header_can_carry() -> None:
    check_token("aB3-._~+/=", "file")
    with pytest.raises(ValueError, match="no token in file"):
        check_token("", "file")
    for odd in ("\u200b", "\ufeff", "\u00e9", "\n", "\x7f"):
        with pytest.raises(ValueError, match="the token in file: expected printable ASCII") as caught:
            check_token(f"secret{odd}part", "file")
        assert f"got {odd!a} as character 7" in str(caught.value)
        assert "secret" not in str(caught.value)
