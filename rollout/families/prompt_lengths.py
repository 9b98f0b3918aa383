"""Lengths of prompts in tokens, and warnings about truncated ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

NAMED: Final = 5
"""Number of prompts that a warning names."""
UNLIMITED: Final = 10**9
"""Length from which a tokenizer's own counts as unlimited; without one, tokenizers state far larger ones."""


@dataclass(frozen=True, slots=True)
class TextReader:
    """A family's tokenizer, with its counter of tokens (template included) and the length of truncation.

    ``room``, that length, is ``rollout.text_tokens`` if ``adjustable``, else the encoder's own.
    """

    name: str
    room: int
    count: Callable[[Sequence[str]], list[int]]
    adjustable: bool = True


def plain(tokenizer: Any) -> Callable[[Sequence[str]], list[int]]:
    """Return a counter of a tokenizer's tokens of plain texts, with start and end tokens."""

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), verbose=False).input_ids]

    return count


def clip_reader(tokenizer: Any) -> TextReader:
    """Describe CLIP's tokenizer, which truncates at its model's length."""
    return TextReader("CLIP", int(tokenizer.model_max_length), plain(tokenizer), adjustable=False)


def chat_reader(name: str, tokenizer: Any, room: int, **template: Any) -> TextReader:
    """Describe a tokenizer that sees a prompt as the only message of a chat, to be answered."""
    count = plain(tokenizer)

    def chats(texts: Sequence[str]) -> list[int]:
        messages = [[{"role": "user", "content": text}] for text in texts]
        written = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template
        )
        return count(written)

    return TextReader(name, room, chats)


def cut_prompts(readers: Iterable[TextReader], prompts: Mapping[str, Sequence[str]]) -> list[str]:
    """Describe, for every file of prompts, how many are truncated, at what length, and the first of them.

    Raises:
        ValueError: if ``rollout.text_tokens`` leaves no room for any word of a prompt.
    """
    found = []
    for reader in readers:
        _check_room(reader)
        if reader.room >= UNLIMITED:
            continue
        for source, texts in prompts.items():
            lengths = reader.count(texts)
            cut = [number for number, length in enumerate(lengths, 1) if length > reader.room]
            if cut:
                found.append(
                    f"{source}: {len(cut)} of {len(lengths)} prompts are cut at {reader.room} tokens "
                    f"({reader.name}), the longest has {max(lengths)}; the first: "
                    f"{', '.join(map(str, cut[:NAMED]))}{_advice(reader)}"
                )
    return found


def _check_room(reader: TextReader) -> None:
    own = reader.count([""])[0]
    if reader.adjustable and reader.room <= own:
        raise ValueError(
            f"rollout.text_tokens: got {reader.room}, expected at least {own + 1}: {own} tokens are the same "
            f"for every prompt ({reader.name})"
        )


def _advice(reader: TextReader) -> str:
    return "; raise rollout.text_tokens" if reader.adjustable else ""
