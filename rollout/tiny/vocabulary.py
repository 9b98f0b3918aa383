"""A small CLIP tokenizer for the synthetic world: whole words for its vocabulary, letters for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rollout.tiny.world import COLORS, NUMBERS, PLURALS, RELATIONS, SHAPES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

WORDS: Final = sorted(
    {"photo", "sign", "that", "says", "and", "the", "with"}
    | {word for relation in RELATIONS for word in relation.split()}
    | {*SHAPES, *PLURALS.values(), *COLORS, *NUMBERS},
    key=lambda word: (-len(word), word),  # so that no short word's merges cut a long one apart
)
_ALPHABET: Final = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789", *"!\"'(),-.:?"]


def build_tokenizer(max_length: int) -> CLIPTokenizer:
    """A `CLIPTokenizer` in which every word of the world is one token; ``max_length`` includes both ends."""
    from transformers import CLIPTokenizer

    merges = [pair for word in WORDS for pair in _chain(word)]
    merges = list(dict.fromkeys(merges))
    pieces = [*_ALPHABET, *(f"{letter}</w>" for letter in _ALPHABET), *(a + b for a, b in merges)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *dict.fromkeys(pieces)]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def _chain(word: str) -> list[tuple[str, str]]:
    """Byte-pair merges that build a word from left to right, its last letter carrying the word end."""
    letters = [*word[:-1], f"{word[-1]}</w>"]
    return [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]
