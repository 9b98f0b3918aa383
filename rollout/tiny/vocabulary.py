"""A small CLIP tokenizer for the synthetic world: one token per word of it, letters for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rollout.tiny.world import COLORS, NUMBERS, PLURALS, RELATIONS, SHAPES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

WORDS: Final = sorted(
    {"photo", "sign", "that", "says", "and", "the", "with"}
    | {word for relation in RELATIONS for word in relation.split()}
    | {*SHAPES, *PLURALS.values(), *COLORS, *NUMBERS},
    key=lambda word: (-len(word), word),  # so that no short word's merges split a long one
)
_ALPHABET: Final = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789", *"!\"'(),-.:?"]


def build_tokenizer(max_length: int) -> CLIPTokenizer:
    """Build a `CLIPTokenizer` with one token per word of the world; ``max_length`` includes start and end."""
    from transformers import CLIPTokenizer

    merges = [pair for word in WORDS for pair in _chain(word)]
    merges = list(dict.fromkeys(merges))
    pieces = [*_ALPHABET, *(f"{letter}</w>" for letter in _ALPHABET), *(a + b for a, b in merges)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *dict.fromkeys(pieces)]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def _chain(word: str) -> list[tuple[str, str]]:
    """Return the byte-pair merges that build a word from left to right, the end mark on its last letter."""
    letters = [*word[:-1], f"{word[-1]}</w>"]
    return [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]
